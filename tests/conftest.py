"""One torch thread, a cache of its own for every test, and whole runs in memory."""

from __future__ import annotations

import csv
import gc
import operator
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from hetfl.cli import pictures
from hetfl.config import read_run_file, resolve
from hetfl.parallel import cores
from hetfl.profiling.cost import Cost
from hetfl.rounds.loop import run_round
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import experiment, runner
from hetfl.runs.folder import RunFolder


def pytest_xdist_auto_num_workers(config):
    """One process a core, at most eight, for the whole suite; a single one for chosen paths and for slow tests."""
    whole = config.args == config.getini("testpaths") and config.option.markexpr == "not slow"
    return min(cores(), 8) if whole else 0


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def unsynced():
    """Files of the test process are not forced to the disk: no test outlives a power cut, and some disks take most of a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True)
def unsaved(request, monkeypatch):
    """A run's pictures are made, but not saved, which takes a second of each run, but for tests marked `saves_pictures`."""
    if "saves_pictures" not in request.keywords:
        monkeypatch.setattr(pictures, "save", lambda figure, folder, name: None)


@pytest.fixture
def collected():
    """What a test leaves is collected at its end, while its own filters of warnings hold."""
    yield
    gc.collect()


TINY = {
    "limit": 120, "clients": 3, "batch_size": 64, "rounds": 3, "epochs": 1, "pretrain_steps": 5, "partition": "iid",
    "model": "mlp", "model_args": {"hidden": [8, 6]}, "levels": "1,0.5,0.5", "control": False,
}  # fmt: skip


@pytest.fixture
def simulate(monkeypatch):
    """A run on few digits, round by round: `simulate(extract=…)` gives the experiment; `steps` the rounds to do at once."""

    def start(steps=None, **values):
        made = experiment.prepare(resolve({**TINY, **values}), NoCallback())
        made.state.meter = Unmetered()
        for round in range(1, (made.options.rounds if steps is None else steps) + 1):
            made.last = run_round(made.state, round, made.engine)
        return made

    return start


class Unmetered:
    """Costs are not what these tests are about."""

    def cost(self, sizes, model=None):
        return Cost(0, 0, 0, 0)


class Stopped(Exception):
    """The power went off."""


class Stopping(NoCallback):
    def __init__(self, after):
        self.after, self.rows, self.notes = after, [], []

    def done(self, row):
        self.rows.append(row["round"])
        if row["round"] == self.after:
            raise Stopped

    def note(self, text):
        self.notes.append(text)

    alarm = note


def timeless(path):
    """metrics.csv and clients.csv without what a clock says."""
    tables = []
    for name in ("metrics.csv", "clients.csv"):
        with open(path / name) as file:
            tables.append(
                [{k: v for k, v in row.items() if "simulated" in k or "seconds" not in k} for row in csv.DictReader(file)]
            )
    return tables


def weights(path):
    return load_file(path / "weights.safetensors")


def equal(a, b):
    """Whether two runs ended alike; what differs is printed, for who reads of the failure."""
    found = [*differences(weights(a), weights(b), torch.equal)]
    for table, other in zip(timeless(a), timeless(b), strict=True):
        found += differences(dict(enumerate(table)), dict(enumerate(other)), operator.eq)
    print(*found, sep="\n")  # noqa: T201 (pytest shows it where the test fails)
    return found == []


def differences(ours, others, same):
    """Of two tables of values by name, those that are not the same, both beside each other."""
    for name in sorted(ours.keys() | others.keys()):
        if name not in ours or name not in others or not same(ours[name], others[name]):
            yield f"{name}: {ours.get(name)} is not {others.get(name)}"


def go_on(path):
    watch = Stopping(None)
    options = resolve({**read_run_file(path / "config.toml"), "out": path})
    runner.resume_run(options, RunFolder(path), watch)
    return watch


def changes_nothing(place, options, after=2):
    """Whether a run that is stopped after a round and goes on ends as one that is not stopped; both lie in `place`."""
    runner.run(options, RunFolder(place / "whole").open(), NoCallback())
    with pytest.raises(Stopped):
        runner.run(options, RunFolder(place / "part").open(), Stopping(after))
    go_on(place / "part")
    return equal(place / "whole", place / "part")


@pytest.fixture
def stops():
    """Runs that are stopped and go on: Stopped, Stopping(after), go_on(path), equal(path, path), changes_nothing(path, options)."""
    return SimpleNamespace(Stopped=Stopped, Stopping=Stopping, go_on=go_on, equal=equal, changes_nothing=changes_nothing)
