"""A run that is stopped at any moment goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

from hetfl.cli.main import app, main
from hetfl.config import read_run_file, resolve
from hetfl.errors import RunError
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import runner as experiment
from hetfl.runs.checkpoint import Checkpoints, Snapshot
from hetfl.runs.folder import RunFolder

TINY = {
    "limit": 200, "clients": 4, "rounds": 4, "epochs": 1, "pretrain_steps": 20, "levels": "1:2,0.5:2", "fraction": 0.75,
    "workers": 2,
}  # fmt: skip

HARD = [
    {"extract": "fedconv", "aggregate": "kld"},
    {"extract": "fedconv", "aggregate": "overlap", "set": {"fedconv": {"dilator_steps": 5, "start": "random"}}},
    {"extract": "fiarse", "aggregate": "hermes"},
    {"extract": "lotteryfl"},
    *(pytest.param(values, marks=pytest.mark.slow) for values in (
        {"extract": "lgfedavg"}, {"extract": "dac"}, {"extract": "tailorfl"}, {"extract": "fedmd"}, {"extract": "scalefl"},
        {"extract": "heterofl", "profile": "devices", "levels": None},
    )),
]  # fmt: skip


@pytest.mark.parametrize("values", HARD, ids=lambda v: f"{v['extract']}-{v.get('aggregate', 'own')}")
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, stops, values):
    """Every kind of state there is: filters, branches, masks, homes, prunings, consensus."""
    options = resolve({**TINY, **values})
    experiment.run(options, RunFolder(tmp_path / "whole").open(), NoCallback())
    with pytest.raises(stops.Stopped):
        experiment.run(options, RunFolder(tmp_path / "part").open(), stops.Stopping(1))
    options = resolve({**read_run_file(tmp_path / "part" / "config.toml"), "out": tmp_path / "part"})
    with pytest.raises(stops.Stopped):
        experiment.resume_run(options, RunFolder(tmp_path / "part"), stops.Stopping(3))
    watch = stops.go_on(tmp_path / "part")
    assert any("after round 3" in note for note in watch.notes)
    assert stops.equal(tmp_path / "whole", tmp_path / "part")


@pytest.fixture
def stopped(tmp_path, stops):
    options = resolve({**TINY, "extract": "heterofl", "keep_checkpoints": 2})
    experiment.run(options, RunFolder(tmp_path / "whole").open(), NoCallback())
    with pytest.raises(stops.Stopped):
        experiment.run(options, RunFolder(tmp_path / "part").open(), stops.Stopping(3))
    return tmp_path


def newest(path):
    return sorted((path / "part" / "checkpoints").glob("round-*.json"))[-1]


def test_only_the_last_checkpoints_stay(stopped):
    assert len(list((stopped / "part" / "checkpoints").glob("round-*.json"))) == 2
    needed = {
        part
        for path in (stopped / "part" / "checkpoints").glob("round-*.json")
        for kind in ("tensors", "facts")
        for part in json.loads(path.read_text())["body"][kind].values()
    }
    assert {path.stem for path in (stopped / "part" / "checkpoints" / "objects").iterdir()} == needed


@pytest.mark.parametrize("damage", ["torn list", "tampered list", "torn part", "tampered part", "missing part", "draft left"])
def test_a_damaged_checkpoint_is_seen_and_the_one_before_is_used(stopped, stops, damage):
    path = newest(stopped)
    body = json.loads(path.read_text())["body"]
    part = path.parent / "objects" / f"{body['tensors']['server']}.safetensors"
    if damage == "torn list":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "tampered list":
        path.write_text(path.read_text().replace('"round": 3', '"round": 2'))
    elif damage == "torn part":
        part.write_bytes(part.read_bytes()[:-4])
    elif damage == "tampered part":
        part.write_bytes(part.read_bytes()[:-1] + b"\x07")
    elif damage == "missing part":
        part.unlink()
    else:
        (path.parent / ".round-000009.json.part").write_text("{")
    watch = stops.go_on(stopped / "part")
    damaged = damage != "draft left"
    assert any(f"after round {2 if damaged else 3}" in note for note in watch.notes)
    assert any("damaged" in note and "going back to the one before" in note for note in watch.notes) == damaged
    assert stops.equal(stopped / "whole", stopped / "part")


def test_a_run_without_a_whole_checkpoint_begins_from_its_config(stopped, stops):
    shutil.rmtree(stopped / "part" / "checkpoints")
    watch = stops.go_on(stopped / "part")
    assert any("begins anew" in note for note in watch.notes)
    assert stops.equal(stopped / "whole", stopped / "part")


def test_a_full_disk_leaves_the_last_good_state(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path, 2)
    store.save(Snapshot(1, {"server": {"w": torch.ones(3)}}, {"server": {}}))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hetfl.files.os.fsync", full)
    with pytest.raises(RunError, match=r"No space left on device.*the one before is intact.*hfl resume"):
        store.save(Snapshot(2, {"server": {"w": torch.zeros(3)}}, {"server": {}}))
    monkeypatch.undo()
    found = Checkpoints(tmp_path, 2).load(print)
    assert found.round == 1
    assert found.tensors["server"]["w"].tolist() == [1, 1, 1]
    assert not list(tmp_path.rglob("*.part"))


def test_tensors_come_back_in_their_order_and_kind(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    group = {
        "z": base[:, 1:3],
        "a": base,
        "c": torch.tensor(3),
        "b": torch.tensor([True]),
        "y": base.expand(2, 3, 4),
        "0:1": base[0:0],
    }
    Checkpoints(tmp_path).save(Snapshot(1, {"g": group}))
    back = Checkpoints(tmp_path).load(print).tensors["g"]
    assert list(back) == list(group)
    assert all(torch.equal(back[n], group[n]) and back[n].dtype == group[n].dtype for n in group)


def test_what_changes_in_place_is_written_again(tmp_path):
    store, weights = Checkpoints(tmp_path), torch.ones(3)
    store.save(Snapshot(1, {"g": {"w": weights}}))
    weights.add_(1)
    store.save(Snapshot(2, {"g": {"w": weights}}))
    assert Checkpoints(tmp_path).load(print).tensors["g"]["w"].tolist() == [2, 2, 2]


def words(path, *more):
    flags = ["--limit", "200", "--clients", "4", "--rounds", "6", "--epochs", "1", "--pretrain-steps", "20", "--workers", "2"]
    return ["run", "--out", str(path), *flags, *more]


def test_resume_on_the_command_line(tmp_path, capsys):
    runner = CliRunner()
    assert runner.invoke(app, words(tmp_path / "a")).exit_code == 0
    done = runner.invoke(app, ["resume", str(tmp_path / "a")])
    assert done.exit_code == 0
    assert "has ended" in done.output
    for path, why in ((tmp_path / "none", "no run folder"), (tmp_path, "no run folder")):
        with pytest.raises(SystemExit) as ended:
            main(["resume", str(path)])
        assert ended.value.code == 2
        assert why in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.toml").write_text("")
    with pytest.raises(SystemExit) as ended:
        main(["resume", str(tmp_path / "empty")])
    assert ended.value.code == 2
    assert "start it again" in capsys.readouterr().err


def test_two_processes_do_not_share_a_run(tmp_path, capsys):
    holder = RunFolder(tmp_path / "a").open()
    holder.write("config.toml", 'extract = "heterofl"\n')
    with pytest.raises(SystemExit) as ended:
        main(["resume", str(tmp_path / "a")])
    assert ended.value.code == 2
    assert "another process" in capsys.readouterr().err


def killed(path, seconds, *more):
    """A run that is killed after some seconds; whether it had ended before."""
    with open(path.parent / "out.txt", "ab") as out:
        process = subprocess.Popen([sys.executable, "-m", "hetfl.cli.main", *more], stdout=out, stderr=out, start_new_session=True)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return False
    assert process.returncode == 0, (path.parent / "out.txt").read_text()
    return True


def survive(stops, tmp_path, kills, seed, longest, *more):
    """Runs are killed at random moments, `kills` times in all, and resumed until they end: the same bits as one nobody stopped."""
    moments, rounds = random.Random(seed), ("--rounds", "25", *more)
    result = CliRunner().invoke(app, words(tmp_path / "whole", *rounds))
    assert result.exit_code == 0, result.output
    done, runs = 0, 0
    while done < kills:
        path, runs = tmp_path / f"killed-{runs}", runs + 1
        command = words(path, *rounds)
        while not killed(path, moments.uniform(1.0, longest) if done < kills else 600.0, *command):
            done += 1
            begun = (path / "config.toml").exists() and (path / "config.toml").read_text()
            shutil.rmtree(path) if path.exists() and not begun else None
            command = ["resume", str(path)] if begun else words(path, *rounds)
        assert stops.equal(tmp_path / "whole", path)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, stops):
    survive(stops, tmp_path, 1, time.time_ns(), 3.0, "--extract", "heterofl")


@pytest.mark.slow
def test_many_kills_and_always_the_same_bits(tmp_path, stops):
    """`HETFL_KILLS` says how many."""
    survive(stops, tmp_path, int(os.environ.get("HETFL_KILLS", "6")), 0, 6.0, "--extract", "fiarse", "--aggregate", "hermes")
