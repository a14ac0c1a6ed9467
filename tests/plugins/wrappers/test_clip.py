"""Clipped updates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.faults import changed, with_bad
from hetfl.plugins.wrappers.clip import clip_update
from hetfl.rounds.loop import run_round


@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 10), st.integers(0, 9))
def test_an_update_is_clipped_to_the_norm_and_keeps_its_direction(most, seed):
    generator = torch.Generator().manual_seed(seed)
    before = {"a": torch.randn(3, 4, generator=generator), "n": torch.tensor(3)}
    after = {"a": before["a"] + torch.randn(3, 4, generator=generator), "n": torch.tensor(7)}
    found = clip_update(after, before, most)
    change, whole = found["a"] - before["a"], after["a"] - before["a"]
    assert float(change.norm()) <= most * (1 + 1e-5) or torch.equal(found["a"], after["a"])
    assert torch.allclose(change / change.norm(), whole / whole.norm(), atol=1e-4)
    assert found["n"] == 7


@pytest.mark.parametrize("wrap", ["clip", "dp"])
def test_a_client_that_skips_its_clipping_moves_no_more_than_the_norm(monkeypatch, wrap):
    """One that sends 1e10 in every entry, and says that it has a million examples."""
    moved = []
    options = {"wrap": (wrap,), "set": {wrap: {"norm": 0.05, **({"noise": 0.0} if wrap == "dp" else {})}}}
    for spoil in (None, changed(state=lambda r: {n: t + 1e10 for n, t in r.state.items()}, examples=lambda r: 10**6)):
        made = with_bad(monkeypatch, spoil, **options)
        run_round(made.state, 1, made.engine)
        assert not any("fault" in row for row in made.state.client_rows)
        moved.append(torch.cat([t.flatten() for t in made.server.state.values() if t.is_floating_point()]))
    assert float((moved[0] - moved[1]).norm()) <= 2 * 0.05 * (1 + 1e-4)
