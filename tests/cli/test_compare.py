"""The table that one pastes."""

from __future__ import annotations

import csv
import io
import json

import pytest

from helpers.cli import exit_code, hfl
from helpers.ended import ended


@pytest.fixture
def three(tmp_path):
    """Three methods of three seeds: the best, one no different from it, one clearly worse, which has no level."""
    values = {"heterofl": (0.8, 0.7, 0.9), "fedrolex": (0.7, 0.75, 0.85), "fjord": (0.5, 0.4, 0.6)}
    for extract, seeds in values.items():
        for seed, value in enumerate(seeds):
            more = {"mean level@test": value - 0.1, "worst level@test": value - 0.2} if extract != "fjord" else {}
            rows = [{"round": 1, "global@test": value, "bytes down": 1000, "bytes up": 0, "seconds": 1}]
            ended(tmp_path / f"{extract}-{seed}", {"global@test": value, **more}, rows, extract=extract, seed=seed)
    return tmp_path


def printed(capsys, *words):
    assert exit_code("compare", *words) == 0
    return capsys.readouterr().out


def test_latex_has_best_and_second_and_what_is_not_significant(three, capsys):
    out = printed(capsys, three, "--format", "latex")
    lines = {line.split(" & ")[0]: line for line in out.splitlines() if " & " in line}
    assert r"\textbf{80.0 $\pm$ 10.0}" in lines["heterofl x overlap"]
    assert r"\underline{76.7 $\pm$ 7.6$^{\approx}$}" in lines["fedrolex x overlap"]
    assert r"50.0 $\pm$ 10.0 &" in lines["fjord x overlap"]
    assert r"n/a" in lines["fjord x overlap"]
    assert out.index(r"\toprule") < out.index(r"\midrule") < out.index(r"\bottomrule")


def test_markdown_and_the_interval(three, capsys):
    out = printed(capsys, three, "--format", "markdown", "--interval", "--costs", "parameters")
    assert "| method | seeds | global@test | mean level | worst level | parameters at 1 / 0.5 |" in out
    assert "| **80.0 ± 24.8** |" in out
    assert "| 100 / 25 |" in out
    assert "95 % interval (Student's t)" in out


def test_csv_and_json_have_numbers(three, capsys):
    rows = list(csv.DictReader(io.StringIO(printed(capsys, three, "--format", "csv", "--target", "0.7"))))
    best = next(r for r in rows if r["method"] == "heterofl x overlap")
    assert float(best["global@test mean"]) == pytest.approx(0.8)
    assert float(best["parameters 0.5"]) == 25
    assert float(best["rounds to 70%"]) == 1
    assert float(best["bytes to 70%"]) == 1000
    found = json.loads(printed(capsys, three, "--format", "json"))
    assert {row["global@test not significant"] for row in found["rows"]} == {True, False}
    assert next(r for r in found["rows"] if r["method"] == "fjord x overlap")["worst level mean"] is None


def test_the_way_to_a_target_has_simulated_seconds_and_joules_where_a_run_has_a_fleet(three, capsys):
    clock = [{"simulated seconds so far": 2.5 * n, "joules so far": 7.0 * n} for n in (1, 2)]
    rows = [{"round": n, "global@test": n / 2, "bytes down": 1, "bytes up": 1, "seconds": 1, **clock[n - 1]} for n in (1, 2)]
    for seed, value in enumerate((0.9, 0.9)):
        ended(three / f"full-{seed}", {"global@test": value}, rows, extract="full", seed=seed)
    words = ("--metric", "global@test", "--format", "csv", "--target", "0.7")
    found = {row["method"]: row for row in csv.DictReader(io.StringIO(printed(capsys, three, *words)))}
    assert (found["full x overlap"]["simulated seconds to 70%"], found["full x overlap"]["joules to 70%"]) == ("5.0", "14.0")
    assert found["heterofl x overlap"]["joules to 70%"] == ""
    assert "simulated" not in printed(capsys, three / "heterofl-0", *words)


def test_no_word_is_broken_at_80_columns(three, capsys, monkeypatch):
    from hetfl.cli import console

    monkeypatch.setattr(console.console, "width", 80)
    out = printed(capsys, three, "--target", "0.7")
    table = out.split("%, the mean")[0]
    assert max(map(len, table.splitlines())) <= 80
    for word in ("method", "seeds", "global@test", "parameters", "heterofl", "overlap", "80.0 ± 10.0", "76.7 ± 7.6≈", "never"):
        assert word in table, word


@pytest.mark.parametrize(("words", "said"), [
    (["--metric", "global@tset"], "did you mean 'global@test'"),
    (["--costs", "parameter"], "did you mean 'parameters'"),
    (["--format", "tex"], "is not one of"),
])  # fmt: skip
def test_bad_questions_are_refused_in_one_sentence(three, capsys, words, said):
    code, _, err = hfl(capsys, "compare", three, *words)
    assert (code, said in err) == (2, True), err
