"""Published tables as data, and the scorecard of our runs."""

from __future__ import annotations

import csv
import sys
from importlib.metadata import EntryPoint

import pytest

from helpers.cli import exit_code
from hetfl.cli.main import main
from hetfl.cli.reproduce import parse_duration
from hetfl.errors import UsageError
from hetfl.hooks.loading import load_plugins
from hetfl.runs import reproduction
from hetfl.runs.cell import TrialResult
from hetfl.runs.reproduction import TableRow, find_rows, run_rows, score_row, tables

TABLE = """
[tiny]
paper = "Nobody"
about = "two rows on digits"
source = "made up"
band = 100.0
seeds = 2
unlike = "everything"

[[tiny.rows]]
name = "narrow"
options = { extract = "heterofl", dataset = "digits", limit = 150, clients = 3, rounds = 1, epochs = 1, pretrain_steps = 2 }
published = { "global@test" = 50.0, MB = 1.0 }
others = { Someone = { "global@test" = 51.0 } }
minutes = 0.001

[[tiny.rows]]
name = "narrow and dear"
options = { extract = "full", dataset = "digits", limit = 150, clients = 3, rounds = 1, epochs = 1, pretrain_steps = 2 }
published = { "global@test" = 50.0 }
minutes = 1000
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The table above, as an installed package brings it."""
    package = tmp_path / "their_tables"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tables.toml").write_text(TABLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("tiny", "their_tables", "hetfl.tables")
    monkeypatch.setattr(reproduction, "entry_points", lambda group: [point] if group == "hetfl.tables" else [])
    tables.cache_clear()
    yield tables()["tiny"]
    tables.cache_clear()
    sys.modules.pop("their_tables", None)


def hfl(*words):
    return exit_code("reproduce", *words)


@pytest.mark.parametrize("row", [row for table in tables().values() for row in table.rows], ids=lambda r: f"{r.table}-{r.name}")
def test_every_row_of_the_built_in_tables_is_a_run_with_a_value(row):
    trials = row.trials(2)
    assert [trial.seed for trial in trials] == [0, 1]
    assert trials[0].key != trials[1].key
    load_plugins(trials[0].options)  # its options are those of its own plugins
    assert all(0 < value <= 100 or metric == "MB" for metric, value in row.published.items())


def test_the_rows_of_a_table_differ_from_each_other():
    for table in tables().values():
        keys = [row.trials(1)[0].key for row in table.rows]
        assert len(set(keys)) == len(keys), table.name
        assert len({row.name for row in table.rows}) == len(keys)


def test_a_table_of_a_package_is_run_and_scored_within_its_budget(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert hfl("tiny", "--budget", "5m", "--out", str(out), "--jobs", "2") == 0
    lines = {(r["row"], r["metric"]): r for r in csv.DictReader((out / "scorecard.csv").read_text().splitlines())}
    narrow = lines["narrow", "global@test"]
    assert (narrow["seeds"], narrow["within"], narrow["others"], narrow["unlike"]) == ("2", "yes", "Someone 51", "everything")
    assert float(narrow["std"]) > 0
    assert float(lines["narrow", "MB"]["ours"]) > 0
    assert lines["narrow and dear", "global@test"]["within"] == "not run"
    assert "unlike the paper: everything" in capsys.readouterr().out.replace("\n", " ")
    before = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/summary.json")}
    assert len(before) == 2
    assert hfl("tiny", "--rows", "narrow", "--out", str(out)) == 0  # an exact name; and what is there is not run again
    assert {p: p.stat().st_mtime_ns for p in out.glob("cells/*/summary.json")} == before


def test_cheap_rows_come_first_in_a_budget(tiny, tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(reproduction, "run_trials", lambda trials, out, jobs: begun.extend(t.extract for t in trials) or iter(()))
    rows = [tiny.rows[1], tiny.rows[0]]
    list(run_rows(rows, tmp_path, 1, lambda row: row.trials(1), 60.0))
    assert begun == ["heterofl"]
    begun.clear()
    list(run_rows(rows, tmp_path, 1, lambda row: row.trials(1), 1e6))
    assert begun == ["heterofl", "full"]


@pytest.mark.parametrize(("ours", "verdict"), [([0.95, 0.97], "yes"), ([0.90], "no (-6.0)"), ([], "not run")])
def test_the_verdict_is_by_the_band(ours, verdict):
    row = TableRow("t", "r", {}, {"global@test": 96.0}, band=1.0)
    results = [TrialResult(None, "ok", {"global@test": value, "seconds": 1.0}) for value in ours]
    score = score_row(row, [*results, None])[0]
    assert score.verdict == verdict
    assert score.seeds == len(ours)
    assert score.std is None if len(ours) < 2 else score.std == pytest.approx(1.4142, rel=1e-3)


def test_what_cannot_be_found_is_said(tiny):
    with pytest.raises(UsageError, match="unknown table 'tini'; did you mean 'tiny'"):
        find_rows("tini", [])
    with pytest.raises(UsageError, match="no row is called 'narow'; did you mean 'narrow'"):
        find_rows("tiny", ["narow"])
    assert [row.name for row in find_rows("tiny", ["dear"])] == ["narrow and dear"]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("2", 120)])
def test_a_budget_is_a_time(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["0", "-1m", "soon", "3d"])
def test_what_is_no_time_is_refused(text, capsys):
    assert hfl("--budget", text) == 2
    assert "--budget takes a time such as 90s, 30m or 2h" in capsys.readouterr().err


def test_the_list_runs_nothing(tmp_path, capsys):
    assert hfl("heterofl-mnist-iid", "--list", "--out", str(tmp_path / "none")) == 0
    assert "a-b-c-d-e" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_what_had_ended_is_scored_when_it_is_stopped(tiny, tmp_path, monkeypatch):
    def stopped(trials, out, jobs):
        yield TrialResult(trials[0], "ok", {"global@test": 0.5, "seconds": 1.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduction, "run_trials", stopped)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        main(["reproduce", "tiny", "--out", str(tmp_path)])
    assert (tmp_path / "scorecard.csv").read_text().count("not run") == 3
