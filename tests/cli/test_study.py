"""hfl scale and hfl matrix."""

from __future__ import annotations

import time

import pandas as pd
import pytest

from helpers.cli import hfl
from hetfl.cli import live, pictures, study
from hetfl.errors import RunError
from hetfl.runs.cell import TrialResult
from hetfl.runs.folder import RunFolder
from hetfl.runs.sweep import plan_trials


@pytest.mark.saves_pictures
@pytest.mark.slow
def test_scale_measures_a_pair_by_the_number_of_clients(tmp_path, capsys):
    out = tmp_path / "scale"
    small = ["--limit", 200, "--model", "mlp", "--pretrain-steps", 2, "--rounds", 2]
    code, said, _ = hfl(capsys, "scale", "--extract", "heterofl", "--clients", "2,6", "--out", out, *small)
    assert code == 0
    assert "server seconds grow as clients^" in said
    rows = pd.read_csv(out / "scale.csv")
    assert rows["clients"].tolist() == [2, 6]
    assert (rows["server seconds"] > 0).all()
    assert (rows["peak memory"] > 1e7).all()
    assert rows["bytes up"][1] > rows["bytes up"][0] > 0
    assert (out / "scale.png").stat().st_size > 1000


@pytest.mark.parametrize(("words", "said"), [
    (["--clients", "ten"], "--clients takes different numbers of clients such as 10,100,1000, not 'ten'"),
    (["--clients", "5,5"], "--clients takes different numbers"),
    (["--clients", "10", "--rounds", "1"], "--rounds must be 2 or more here"),
    (["--clients", "10", "--extract", "fedcon"], "did you mean 'fedconv'"),
    (["--clients", "100000", "--limit", "200"], "client"),
])  # fmt: skip
def test_scale_says_what_is_wrong(tmp_path, capsys, words, said):
    code, _, error = hfl(capsys, "scale", "--out", tmp_path / "s", *words)
    assert code == 2
    assert said in error


def test_a_matrix_in_which_every_run_failed_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "draw_matrix", lambda *_: None)
    monkeypatch.setattr(study.render, "print_leaderboard", lambda *_: None)
    (trial,) = plan_trials({"dataset": "digits"}, [("heterofl", "overlap")], {}, [0])
    failed = TrialResult(trial, "failed", {"why": "no space left"})
    with pytest.raises(RunError, match=r"1 of 1 trials failed, the first: .*: no space left"):
        study.conclude([failed], "global@test", tmp_path)


def test_a_long_run_of_a_sweep_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(live, "LOOK", 0.01)
    trials = plan_trials({"dataset": "digits", "rounds": 50}, [("heterofl", "overlap")], {}, [0, 1, 2])
    for trial, rounds in zip(trials, (12, 50, 0), strict=True):
        cell = RunFolder(tmp_path / "cells" / trial.name).open()
        cell.table("metrics.csv", [{"round": n} for n in range(1, rounds + 1)])
    cell = RunFolder(tmp_path / "cells" / trials[1].name)
    cell.json("summary.json", {})  # it has ended
    said = ""
    with live.SweepDisplay(trials, "global@test", tmp_path):
        end = time.monotonic() + 20
        while "round" not in said and time.monotonic() < end:
            time.sleep(0.02)
            said += capsys.readouterr().out
        time.sleep(0.05)
    said += capsys.readouterr().out
    assert said.split("\n") == ["heterofl x overlap  seed 0: round 12 of 50 has ended", ""]
