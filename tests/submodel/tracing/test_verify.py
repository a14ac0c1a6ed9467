"""Modules that nobody wrote for us: traced and cut at random, sliced is masked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.modules import MODULES, ZOO, traced
from hetfl.models.state import tensors
from hetfl.models.zoo import CNN
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.tracing.verify import chosen, compared


@pytest.mark.parametrize("name", [*MODULES, *ZOO])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=4, deadline=None)
def test_sliced_is_masked_and_trains(name, seed):
    model, x = traced(name)
    before = {n: t.clone() for n, t in tensors(model).items()}
    widths = trace(model, x)
    assert all(torch.equal(t, before[n]) for n, t in tensors(model).items())
    assert widths.elastic() > 0.7
    draw = torch.Generator().manual_seed(seed)
    kept = {g.name: chosen(g.size, draw) for g in widths.groups}
    small, error = compared(widths, model, [x], kept, draw)
    assert error <= 1e-5
    small.train()(x).sum().backward()


def test_batch_norm_nets_are_equal_without_leaving_anything_out():
    torch.manual_seed(0)
    model, x = CNN(10, 1, (16, 32, 64)).eval(), torch.randn(2, 1, 28, 28)
    widths = trace(model, x)
    kept = {g.name: chosen(g.size, torch.Generator().manual_seed(1)) for g in widths.groups}
    assert compared(widths, model, [x], kept, torch.Generator().manual_seed(2))[1] <= 1e-5
