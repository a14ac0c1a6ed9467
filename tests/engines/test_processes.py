"""Clients in processes."""

from __future__ import annotations

import pytest
import torch

from helpers.runs import FOUR_CLIENTS
from hetfl.config import resolve
from hetfl.engines.processes import to_bytes
from hetfl.rounds.loop import run_round
from hetfl.rounds.reporting import NoCallback
from hetfl.runs.experiment import prepare


@pytest.mark.slow
def test_a_process_that_dies_takes_no_more_than_its_client_with_it():
    options = {**FOUR_CLIENTS, "extract": "heterofl", "engine": "processes", "workers": 2, "wrap": ["helpers.deadly:Deadly"]}
    made = prepare(resolve(options), NoCallback())
    try:
        run_round(made.state, 1, made.engine)
        run_round(made.state, 2, made.engine)
    finally:
        made.close()
    faults = [(row["round"], row["client"], row["fault"]) for row in made.state.client_rows if "fault" in row]
    assert faults == [(1, 1, "the client's process ended before it answered")]
    assert [row["left out"] for row in made.state.rows] == [1, 0]


def test_a_view_travels_as_its_own_entries_alone():
    whole = torch.zeros(1000, 1000)
    assert len(to_bytes(whole[:2, :2])) < 1000
    assert len(to_bytes({"x": [whole[:, :1]]})) < 10_000
