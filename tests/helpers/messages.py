"""States and replies as they travel."""

from __future__ import annotations

import torch


def masked_state():
    generator = torch.Generator().manual_seed(0)
    state = {"a": torch.randn(7, 5, generator=generator), "b": torch.randn(3), "c": torch.tensor(4)}
    masks = {"a": torch.rand(7, 5, generator=generator) > 0.6}
    return {**state, "a": state["a"] * masks["a"]}, masks
