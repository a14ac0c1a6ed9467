"""Clients in processes."""

from __future__ import annotations

import os
import signal

import pytest

from helpers.runs import FOUR_CLIENTS
from hetfl.config import resolve
from hetfl.rounds.reporting import NoCallback
from hetfl.runs.experiment import prepare


@pytest.mark.slow
def test_a_process_that_dies_takes_no_more_than_its_client_with_it():
    made = prepare(resolve({**FOUR_CLIENTS, "extract": "heterofl", "engine": "processes", "workers": 1}), NoCallback())
    try:
        made.rounds.step(1, made.grid)
        for pid in made.grid._crew._all[0]._processes:
            os.kill(pid, signal.SIGKILL)
        made.rounds.step(2, made.grid)
    finally:
        made.close()
    faults = [row["fault"] for row in made.rounds.client_rows if "fault" in row]
    assert faults == ["its profile: the client's process ended before it answered"]
    assert made.rounds.rows[-1]["left out"] == 1
