"""Modules that nobody wrote for us: traced and cut at random, sliced is masked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.modules import MODULES, ZOO, traced
from hetfl.models.convnets import CNN
from hetfl.models.state import tensors
from hetfl.profiling.cost import LiveBytes
from hetfl.submodel.tracing.groups import empty_frozen, trace
from hetfl.submodel.tracing.verify import compare_cut, draw_units, is_hollow

BIG = {"googlenet", "mobilenetv2"}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in BIG)) for n in (*MODULES, *ZOO)])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=4, deadline=None)
def test_sliced_is_masked_and_trains(name, seed):
    model, x = traced(name)
    before = {n: t.clone() for n, t in tensors(model).items()}
    widths = trace(model, x)
    assert all(torch.equal(t, before[n]) for n, t in tensors(model).items())
    assert widths.elastic() > 0.7
    draw = torch.Generator().manual_seed(seed)
    kept = {g.name: draw_units(g.size, draw) for g in widths.groups}
    small, error = compare_cut(widths, model, [x], kept, draw)
    assert error <= 1e-5
    small.train()(x).sum().backward()


def test_batch_norm_nets_are_equal_without_leaving_anything_out():
    torch.manual_seed(0)
    model, x = CNN(10, 1, (16, 32, 64)).eval(), torch.randn(2, 1, 28, 28)
    widths = trace(model, x)
    kept = {g.name: draw_units(g.size, torch.Generator().manual_seed(1)) for g in widths.groups}
    assert compare_cut(widths, model, [x], kept, torch.Generator().manual_seed(2))[1] <= 1e-5


def test_a_tensor_that_was_emptied_is_hollow_whatever_its_shape():
    layers = nn.Sequential(nn.Conv2d(2, 8, 1), nn.Conv2d(8, 8, 3, groups=8), nn.Linear(1, 8), nn.Linear(8, 4)).requires_grad_(False)
    assert not any(is_hollow(p) for p in layers.parameters())
    empty_frozen(layers)
    assert all(is_hollow(p) for p in layers.parameters())


def test_a_proof_holds_no_second_model_and_needs_no_values_of_a_frozen_one():
    def make():
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Sequential(nn.Linear(128, 128), nn.ReLU()) for _ in range(12)], nn.Linear(128, 4))

    model, x, peaks = make(), torch.randn(2, 128), []
    size = sum(p.nbytes for p in model.parameters())
    found = trace(model, x)
    for hollow in (False, True):
        model = make().requires_grad_(False)
        with LiveBytes([*model.parameters()]) as alive:
            assert trace(model, x, hollow=hollow).groups == found.groups
        peaks.append(alive.peak / size)
        assert (sum(p.untyped_storage().nbytes() for p in model.parameters()) < size / 1000) == hollow
    assert peaks[0] < 2, "copies of the whole model"
    assert peaks[1] < 1.25
    kept = {g.name: torch.arange(g.size - 1) for g in found.groups}
    with LiveBytes([]) as alive:
        compare_cut(found, model, [x], kept, torch.Generator().manual_seed(0))
    assert alive.peak / size < 0.4, "a frozen model that is cut has no values of its own"
