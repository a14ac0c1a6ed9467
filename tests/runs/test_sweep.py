"""Matrices of runs and their cache."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
import time
from concurrent.futures import Future

import pytest
from pebble import ProcessExpired

from helpers.cli import exit_code
from hetfl import registry
from hetfl.cli import pictures
from hetfl.config import RunOptions
from hetfl.errors import NotApplicable, UsageError
from hetfl.runs import runner, sweep
from hetfl.runs.folder import FolderInUseError, RunFolder
from hetfl.runs.runner import RunRecorder

SMALL = ["--limit", "150", "--clients", "3", "--rounds", "1", "--epochs", "1", "--pretrain-steps", "2", "--seeds", "0,1"]


def hfl(*words):
    return exit_code("matrix", *words)


def rows_of(out):
    return list(csv.DictReader((out / "matrix.csv").read_text().splitlines()))


@pytest.mark.saves_pictures
def test_a_matrix_end_to_end_and_again_from_its_cache(tmp_path, capsys, monkeypatch):
    out = tmp_path / "m"
    words = ["--extract", "heterofl,fedmd", "--alpha", "0.3", *SMALL, "--out", str(out), "--jobs", "2"]
    models = ["--set", 'extract.fedmd.models={"0.5":"mlp"}', "--aggregate", "overlap"]
    assert hfl(*words, *models) == 0
    rows = rows_of(out)
    assert len(rows) == 5 * 2
    told = {(r["extract"], r["status"]) for r in rows}
    assert ("fedmd", "not applicable") in told
    assert {("heterofl", "ok"), ("serveralone", "ok"), ("standalone", "ok"), ("exclusive", "ok")} <= told
    assert {r["seed"] for r in rows} == {"0", "1"}
    import pyarrow.parquet as parquet

    assert parquet.read_table(out / "matrix.parquet").num_rows == len(rows)
    assert (out / "heatmap.png").stat().st_size > 1000
    assert "share no coordinates" in capsys.readouterr().out
    monkeypatch.setattr(pictures, "save", lambda figure, folder, name: None)
    before = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/summary.json")}
    assert hfl(*words, *models) == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("cells/*/summary.json")} == before
    assert rows_of(out) == rows
    victim = next(iter(before)).parent
    (victim / "summary.json").unlink()  # as if it had been killed
    assert hfl(*words, *models) == 0
    again = rows_of(out)
    timeless = lambda rows: [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]  # noqa: E731
    assert timeless(again) == timeless(rows)


def test_a_smaller_selection_loses_no_row_and_levels_have_their_costs(tmp_path, capsys):
    out, few = tmp_path / "m", ["--limit", "150", "--clients", "2", "--rounds", "1", "--epochs", "1", "--model", "mlp",
                                "--pretrain-steps", "2", "--levels", "1,0.5"]  # fmt: skip
    words = [*few, "--out", str(out), "--seeds", "0,1", "--alpha", "1,0.3"]
    assert hfl("--extract", "heterofl,fedrolex", *words) == 0
    said = capsys.readouterr().out
    assert said.index("alpha 1") < said.index("alpha 0.3"), "columns in the order asked"
    assert "two seeds say little" in said
    whole = rows_of(out)
    assert hfl("--extract", "fedrolex", *few, "--out", str(out), "--seeds", "0,", "--alpha", "0.3") == 0
    assert sorted(rows_of(out), key=str) == sorted(whole, key=str)
    (row, *_) = [r for r in whole if r["extract"] == "heterofl"]
    assert float(row["level-1 parameters"]) > float(row["level-0.5 parameters"]) > 0
    assert float(row["level-1 bytes up"]) > float(row["level-0.5 bytes up"]) > 0
    levels = [float(row[f"level-{r}@test"]) for r in ("1", "0.5")]
    assert float(row["mean level@test"]) == pytest.approx(sum(levels) / 2)
    assert float(row["worst level@test"]) == pytest.approx(min(levels))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--extract", "heterofle"], "unknown extract plugin 'heterofle'; did you mean 'heterofl'?"),
        (["--aggregate", "kdl"], "unknown aggregate plugin 'kdl'; did you mean 'kld'?"),
        (["--sweep", "roundz=1"], "unknown option 'roundz'; did you mean 'rounds'?"),
        (["--sweep", "fedcon.steps=1"], "unknown plugin 'fedcon'; did you mean 'fedconv'?"),
        (["--sweep", "fedconv.stepz=1"], "unknown option 'fedconv.stepz'; did you mean 'steps'?"),
        (["--sweep", "lr=fast"], "--lr: "),
        (["--sweep", "seed=1,2"], "'seed' is not swept"),
        (["--seeds", "0"], "--seeds takes how many"),
        (["--dataset", "digit"], "did you mean 'digits'"),
    ],
)
def test_bad_matrices_are_refused_before_anything_runs(tmp_path, capsys, words, said):
    assert hfl(*words, "--out", str(tmp_path / "m")) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("m/cells/*/summary.json"))


def test_pairs_and_controls():
    controls = [e.name for e in registry.builtins() if e.control]
    assert controls == ["serveralone", "standalone", "exclusive"]
    found = sweep.cross_plugins(["all"], ["all"])
    extractions = [e for e in registry.entries("extract") if e.any_model and not e.control]
    aggregations = [e for e in registry.entries("aggregate") if e.any_model]
    assert len(found) == len(extractions) * len(aggregations) + 3
    assert "loraranks" not in {extract for extract, _ in found}
    assert ("fedconv", "kld") in sweep.cross_plugins(["fedconv"], ["natural"])


def test_options_reach_only_the_pairs_that_have_them():
    base = {"set": {"fedconv": {"steps": 3}, "levels": {"mix": "1"}, "aggregate": {"hermes": {"overlap": "all"}}}}
    found = sweep.plan_trials(base, [("fedconv", "kld"), ("heterofl", "hermes")], {"kld.lr": [0.1], "data.public": [0.2]}, [0])
    assert found[0].options.set == {"fedconv": {"steps": 3}, "levels": {"mix": "1"}, "kld": {"lr": 0.1}}
    assert found[1].options.set == {"levels": {"mix": "1"}, "aggregate": {"hermes": {"overlap": "all"}}}
    assert found[0].options.server_data == 0.2
    assert found[0].key != found[1].key
    same = sweep.plan_trials(base, [("fedconv", "kld")], {"kld.lr": [0.1], "data.public": [0.2]}, [0])
    assert same[0].key == found[0].key


def matrix_process(out):
    words = ["matrix", "--extract", "heterofl", *SMALL[:-1], "0,", "--rounds", "100000", "--no-control", "--out", str(out)]
    with open(out.parent / "said.txt", "ab") as said:
        return subprocess.Popen([sys.executable, "-m", "hetfl.cli.main", *words], stdout=said, stderr=said)


def until(what, seconds=90.0):
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:
        time.sleep(0.1)
    assert what()


@pytest.mark.slow
def test_the_workers_of_a_killed_matrix_end_and_let_go_of_their_cells(tmp_path):
    out = tmp_path / "m"
    process = matrix_process(out)
    try:
        until(lambda: list(out.glob("cells/heterofl*/metrics.csv")))
        (cell,) = out.glob("cells/heterofl*")
        with pytest.raises(FolderInUseError):
            RunFolder(cell).lock()
    finally:
        process.kill()
    process.wait()
    time.sleep(1.0)
    RunFolder(cell).lock()  # nobody has it


@pytest.mark.slow
def test_a_stopped_matrix_ends_soon(tmp_path):
    out = tmp_path / "m"
    process = matrix_process(out)
    until(lambda: list(out.glob("cells/heterofl*/metrics.csv")))
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert time.monotonic() - began < 3
    assert "the same command goes on" in (tmp_path / "said.txt").read_text()


def test_a_cell_that_another_process_has_is_waited_for(tmp_path, monkeypatch):
    (trial,) = sweep.plan_trials({}, [("heterofl", "overlap")], {}, [0])
    other = RunFolder(tmp_path / "cells" / trial.name).open()
    assert not sweep.run_trial(trial, tmp_path, 1, wait_for_others=False)

    def finish(seconds):
        other.json("summary.json", {"status": "not applicable", "why": "x"})

    monkeypatch.setattr(sweep.time, "sleep", finish)
    assert sweep.run_trial(trial, tmp_path, 1, wait_for_others=True)
    assert not (other.path / "metrics.csv").exists()
    other.release()


def test_a_cell_whose_process_dies_has_failed(tmp_path):
    (trial,) = sweep.plan_trials({}, [("heterofl", "overlap")], {}, [0])
    RunFolder(tmp_path / "cells" / trial.name).open().release()
    gone = Future()
    gone.set_exception(ProcessExpired("gone", code=-9))
    assert sweep.end_of(gone, trial, tmp_path)
    assert "the process of this run ended with code -9" in sweep.read_result(tmp_path, trial).row["why"]


TINY = {"dataset": "digits", "limit": 60, "clients": 2, "epochs": 1, "model": "mlp", "server_data": 0, "pretrain_steps": 0,
        "own_test": 0}  # fmt: skip


def test_a_trial_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "CHECKPOINTS", 3)
    (trial,) = sweep.plan_trials({**TINY, "rounds": 6, "eval_every": 6}, [("heterofl", "overlap")], {}, [0])
    assert sweep.run_trial(trial, tmp_path / "whole", 1, wait_for_others=False)
    began, done, record, run, options = list[int](), list[int](), RunRecorder.done, runner.run, list[RunOptions]()
    monkeypatch.setattr(runner, "run", lambda given, *rest: (options.append(given), run(given, *rest)))

    def stop(recorder, row):
        record(recorder, row)
        done.append(row["round"])
        if row["round"] == 3 and not began:
            began.append(3)
            raise KeyboardInterrupt

    monkeypatch.setattr(RunRecorder, "done", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep.run_trial(trial, tmp_path / "stopped", 1, wait_for_others=False)
    assert sweep.read_result(tmp_path / "stopped", trial) is None
    assert sweep.run_trial(trial, tmp_path / "stopped", 1, wait_for_others=False)
    assert done == [1, 2, 3, 3, 4, 5, 6]  # the last checkpoint was after round 2
    assert not options[0].set
    assert "heterofl" in options[1].set["extract"], "goes on with the defaults of plugins as they are now"
    whole, stopped = (RunFolder(tmp_path / name / "cells" / trial.name) for name in ("whole", "stopped"))
    assert whole.bytes_of("weights.safetensors") == stopped.bytes_of("weights.safetensors")
    assert len(stopped.rows("metrics.csv")) == len(whole.rows("metrics.csv")) == 6
    assert stopped.read("summary.json")["seconds"] >= sum(float(row["seconds"]) for row in stopped.rows("metrics.csv"))
    assert not (whole.path / "checkpoints").exists()
    assert not (stopped.path / "checkpoints").exists()


def test_a_trial_that_failed_begins_anew_and_one_without_an_answer_keeps_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "CHECKPOINTS", 1)
    (trial,) = sweep.plan_trials({**TINY, "rounds": 1}, [("heterofl", "overlap")], {}, [0])
    folder, done, record = RunFolder(tmp_path / "cells" / trial.name), list[int](), RunRecorder.done

    def finish(recorder, row):
        record(recorder, row)
        done.append(row["round"])
        if len(done) in errors:
            raise errors[len(done)]

    errors = {1: ValueError("a plugin that is then mended"), 2: NotApplicable("not applicable: no")}
    monkeypatch.setattr(RunRecorder, "done", finish)
    assert sweep.run_trial(trial, tmp_path, 1, wait_for_others=False)
    assert sweep.read_result(tmp_path, trial).status == "failed"
    assert list(folder.path.glob("checkpoints/round-000001.json"))  # for hfl resume
    assert sweep.run_trial(trial, tmp_path, 1, wait_for_others=False)
    assert done == [1, 1]
    assert sweep.read_result(tmp_path, trial).status == "not applicable"
    assert not (folder.path / "checkpoints").exists()


@pytest.mark.parametrize("text", ['{"a"', "{}", "[]", ""])
def test_a_damaged_cell_is_named(tmp_path, text):
    (trial,) = sweep.plan_trials({}, [("heterofl", "overlap")], {}, [0])
    RunFolder(tmp_path / "cells" / trial.name).open().write("summary.json", text)
    with pytest.raises(UsageError, match=r"/cells/heterofl-.*' is damaged: summary\.json .*; delete that folder to run it again"):
        sweep.read_result(tmp_path, trial)
