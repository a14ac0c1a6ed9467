"""Clients in processes."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from helpers.runs import FOUR_CLIENTS
from hetfl.config import resolve
from hetfl.rounds.loop import run_round
from hetfl.rounds.reporting import NoCallback
from hetfl.runs.experiment import prepare


@pytest.mark.slow
def test_a_process_that_dies_takes_no_more_than_its_client_with_it():
    made = prepare(resolve({**FOUR_CLIENTS, "extract": "heterofl", "engine": "processes", "workers": 1}), NoCallback())
    try:
        run_round(made.state, 1, made.engine)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGKILL)
        run_round(made.state, 2, made.engine)
    finally:
        made.close()
    faults = [row["fault"] for row in made.state.client_rows if "fault" in row]
    assert faults == ["its profile: the client's process ended before it answered"]
    assert made.state.rows[-1]["left out"] == 1
