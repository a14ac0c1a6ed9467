"""Trackers: what they are told, and the real packages in their offline modes where they are installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

from helpers.cli import exit_code
from hetfl.config import resolve
from hetfl.errors import UsageError
from hetfl.runs import trackers
from hetfl.runs.trackers import Tracker, tracking

TINY = ["--extract", "heterofl", "--limit", "150", "--clients", "3", "--rounds", "2", "--epochs", "1", "--pretrain-steps", "2"]


@pytest.fixture
def told(monkeypatch):
    """A tracker `fake` of an installed package, and what it is told."""
    said = []

    def start(project, options, folder):
        said.append(("start", project, options["extract"], folder.name))
        return lambda values, step: said.append((step, values)), lambda: said.append("finish")

    monkeypatch.setitem(trackers.STARTS, "fake", ("json", start))
    return said


def test_a_tracker_gets_every_round_once_and_the_summary(told, tmp_path):
    assert exit_code("run", *TINY, "--track", "fake", "--out", tmp_path / "run") == 0
    assert told[0] == ("start", "hetfl", "heterofl", "run")
    assert [step for step, *_ in told[1:-1]] == [1, 2, 2]
    assert {"global@test", "bytes up", "seconds"} <= set(told[1][1])
    assert "summary global@test" in told[3][1]
    assert told[-1] == "finish"
    assert told.count("finish") == 1


def test_a_tracker_is_ended_where_the_run_is_stopped(told, tmp_path):
    with pytest.raises(KeyboardInterrupt), tracking(["fake"], resolve({}), tmp_path):
        raise KeyboardInterrupt
    assert told[-1] == "finish"


@pytest.mark.parametrize(
    ("name", "said"), [("tensorbord", "unknown tracker 'tensorbord'; did you mean 'tensorboard'?"), ("gone", "pip install no_such")]
)
def test_unknown_and_missing_trackers_are_sentences(name, said, monkeypatch):
    monkeypatch.setitem(trackers.STARTS, "gone", ("no_such", trackers.start_mlflow))
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        Tracker(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "wandb", "trackio"])
def test_the_real_package_offline(name, tmp_path):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install {name}")
    offline = {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": str(tmp_path / "t"),
    }
    words = [sys.executable, "-m", "hetfl.cli.main", "run", *TINY, "--track", name, "--out", str(tmp_path / "run")]
    done = subprocess.run(words, env={**os.environ, **offline}, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = {
        "tensorboard": lambda: list((tmp_path / "run" / "tensorboard").glob("events*")),
        "wandb": lambda: list((tmp_path / "run" / "wandb").glob("offline-run*/*.wandb")),
        "mlflow": lambda: [tmp_path / "mlflow.db"],
        "trackio": lambda: list((tmp_path / "t").rglob("*.db")),
    }[name]()
    assert found
    assert b"global" in b"".join(path.read_bytes() for path in found)
