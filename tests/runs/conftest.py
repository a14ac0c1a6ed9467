"""A run that was stopped."""

from __future__ import annotations

import pytest

from helpers.runs import STOPPABLE
from hetfl.config import resolve
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import runner as experiment
from hetfl.runs.folder import RunFolder


@pytest.fixture
def stopped(tmp_path, stops):
    options = resolve({**STOPPABLE, "extract": "heterofl", "keep_checkpoints": 2})
    experiment.run(options, RunFolder(tmp_path / "whole").open(), NoCallback())
    folder = RunFolder(tmp_path / "part").open()
    with pytest.raises(stops.Stopped):
        experiment.run(options, folder, stops.Stopping(3))
    folder.release()
    return tmp_path
