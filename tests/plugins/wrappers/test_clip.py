"""Clipped updates."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetfl.plugins.wrappers.clip import clip_update


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
