"""A run that is stopped at any moment goes on as if nothing had happened."""

from __future__ import annotations

import os
import time

import pytest

from helpers.killed import kill_often
from helpers.runs import STOPPABLE
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


WORDS = [
    "--limit", 120, "--clients", 4, "--rounds", 12, "--epochs", 1, "--pretrain-steps", 3, "--workers", 2, "--model", "mlp",
    "--model-args", "hidden=[8,6]", "--no-control",
]  # fmt: skip


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, stops):
    whole, folders = kill_often(tmp_path, [*WORDS, "--extract", "heterofl"], 1, time.time_ns())
    assert all(stops.equal(whole, path) for path in folders)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--extract", "fiarse", "--aggregate", "hermes"],
        ["--extract", "heterofl", "--schedule", "fedbuff", "--buffer", 2, "--fleet", "fedgmr", "--clients", 6],
    ],
    ids=["sync", "fedbuff"],
)
def test_many_kills_and_always_the_same_bits(tmp_path, stops, words):
    """`HETFL_KILLS` says how many."""
    whole, folders = kill_often(tmp_path, [*WORDS, *words], int(os.environ.get("HETFL_KILLS", "4")), 0)
    assert all(stops.equal(whole, path) for path in folders)
