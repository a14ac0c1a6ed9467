"""Wrappers go with any pair."""

from __future__ import annotations

import pytest

from helpers.runs import ready

PAIRS = [("heterofl", "overlap"), ("fedconv", "kld"), ("fiarse", "hermes"), ("lotteryfl", "overlap"), ("fedmd", "fedmd"),
         ("dac", "median"), ("lgfedavg", "fedavg")]  # fmt: skip


@pytest.mark.parametrize(("extract", "aggregate"), PAIRS)
@pytest.mark.parametrize("wrap", [("clip",), ("dp", "quantize")])
def test_wraps_go_with_any_pair(extract, aggregate, wrap):
    made = ready(1, extract=extract, aggregate=aggregate, wrap=wrap)
    assert all("fault" not in row for row in made.rounds.client_rows), made.rounds.client_rows[0].get("traceback")
    assert all(t.isfinite().all() for t in made.server.state.values())
