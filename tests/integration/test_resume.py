"""A run that is stopped at any moment goes on as if nothing had happened."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from helpers.cli import run_words
from helpers.runs import STOPPABLE
from hetfl.cli.main import app
from hetfl.config import read_run_file, resolve
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import runner as experiment
from hetfl.runs.folder import RunFolder

HARD = [
    {"extract": "fedconv", "aggregate": "kld"},
    {"extract": "fedconv", "aggregate": "overlap", "set": {"fedconv": {"dilator_steps": 5, "start": "random"}}},
    {"extract": "fiarse", "aggregate": "hermes"},
    {"extract": "lotteryfl", "wrap": ("topk",)},
    *(pytest.param(values, marks=pytest.mark.slow) for values in (
        {"extract": "lgfedavg"}, {"extract": "dac"}, {"extract": "tailorfl"}, {"extract": "fedmd"}, {"extract": "scalefl"},
        {"extract": "heterofl", "profile": "devices", "levels": None},
    )),
]  # fmt: skip


@pytest.mark.parametrize("values", HARD, ids=lambda v: f"{v['extract']}-{v.get('aggregate', 'own')}")
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, stops, values):
    """Every kind of state there is: filters, branches, masks, homes, prunings, consensus."""
    options = resolve({**STOPPABLE, **values})
    experiment.run(options, RunFolder(tmp_path / "whole").open(), NoCallback())
    with pytest.raises(stops.Stopped):
        experiment.run(options, RunFolder(tmp_path / "part").open(), stops.Stopping(1))
    options = resolve({**read_run_file(tmp_path / "part" / "config.toml"), "out": tmp_path / "part"})
    with pytest.raises(stops.Stopped):
        experiment.resume_run(options, RunFolder(tmp_path / "part"), stops.Stopping(3))
    watch = stops.go_on(tmp_path / "part")
    assert any("after round 3" in note for note in watch.notes)
    assert stops.equal(tmp_path / "whole", tmp_path / "part")


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
    result = CliRunner().invoke(app, run_words(tmp_path / "whole", *rounds))
    assert result.exit_code == 0, result.output
    done, runs = 0, 0
    while done < kills:
        path, runs = tmp_path / f"killed-{runs}", runs + 1
        command = run_words(path, *rounds)
        while not killed(path, moments.uniform(1.0, longest) if done < kills else 600.0, *command):
            done += 1
            begun = (path / "config.toml").exists() and (path / "config.toml").read_text()
            shutil.rmtree(path) if path.exists() and not begun else None
            command = ["resume", str(path)] if begun else run_words(path, *rounds)
        assert stops.equal(tmp_path / "whole", path)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, stops):
    survive(stops, tmp_path, 1, time.time_ns(), 3.0, "--extract", "heterofl")


@pytest.mark.slow
def test_many_kills_and_always_the_same_bits(tmp_path, stops):
    """`HETFL_KILLS` says how many."""
    survive(stops, tmp_path, int(os.environ.get("HETFL_KILLS", "6")), 0, 6.0, "--extract", "fiarse", "--aggregate", "hermes")
