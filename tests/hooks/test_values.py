"""What hooks are given and answer."""

from __future__ import annotations

import torch


def test_declared_extras_are_bounded():
    from hetfl.hooks.values import ExtraSpec

    assert ExtraSpec(4).admits(torch.zeros(4))
    assert not ExtraSpec(4).admits(torch.zeros(5))
    assert not ExtraSpec(4).admits(torch.zeros(4, dtype=torch.int64))
