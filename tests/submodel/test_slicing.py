"""A cut model computes what the masked full model does; the counts of the papers."""

from __future__ import annotations

import pytest
import torch

from helpers.elastic import NETS, parameters, traced_net
from hetfl.models.state import load_state, tensors
from hetfl.models.zoo import CNN, FedAvgCNN, FedConvCNN, PreResNet
from hetfl.submodel.blocks import put, take
from hetfl.submodel.slicing import build
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.widths import unit_count


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cut_is_masked(name, seed):
    model, x, widths = traced_net(name)
    draw = torch.Generator().manual_seed(seed)
    kept = {}
    for group in widths.groups:
        size = int(torch.randint(1, group.size + 1, (1,), generator=draw))
        kept[group.name] = torch.randperm(group.size, generator=draw)[:size]
    index = widths.index(kept)
    state = tensors(model)
    small = {n: take(t, index.get(n, {})) for n, t in state.items()}
    masked = {n: put(small[n], index.get(n, {}), torch.zeros_like(t)) for n, t in state.items()}
    with torch.no_grad():
        ours = load_state(build(widths, model, kept), small).eval()(x)
        theirs = torch.func.functional_call(model, masked, (x,))
    assert widths.groups
    assert (ours - theirs).abs().max() <= 1e-5 * (1 + theirs.abs().max())


@pytest.mark.parametrize(
    ("make", "shape", "counts"),
    [
        (lambda: CNN(10, 1), (1, 28, 28), [1556874, 391370, 98922, 25274, 6594]),
        (lambda: PreResNet(10, 3), (3, 32, 32), [11172170, 2796714, 701018, 176178, 44510]),
        (lambda: PreResNet(10, 3, blocks=(1, 1, 1, 2)), (3, 32, 32), [9622090, 2408746, 603802, 151762, 38350]),
    ],
)
def test_parameters_of_levels_a_to_e(make, shape, counts):
    """spec heterofl 6.1"""
    model = make()
    widths = trace(model, torch.randn(2, *shape), verify=False)
    assert [parameters(build(widths, model, widths.prefix(2.0**-i))) for i in range(5)] == counts


def test_parameters_of_fedconvs_net():
    """spec fedconv 6.5"""
    model = FedConvCNN(10, 1, 28)
    widths = trace(model, torch.randn(2, 1, 28, 28))
    counts = {1: 20490, 0.75: 14506, 0.5625: 10396, 0.5: 9098, 0.25: 4266}
    assert {r: parameters(build(widths, model, widths.prefix(r))) for r in counts} == counts
    assert parameters(FedAvgCNN(10, 1, 28)) == 1663370


def test_slice_shapes():
    """spec heterofl 6.2: level c of the first convolutions and of the head"""
    model = PreResNet(10, 3)
    widths = trace(model, torch.randn(2, 3, 32, 32), verify=False)
    small = build(widths, model, widths.prefix(0.25))
    assert small.get_submodule("0").weight.shape == (16, 3, 3, 3)
    assert small.get_submodule("1").conv1.weight.shape == (16, 16, 3, 3)
    assert small.get_submodule("13").weight.shape == (10, 128)
    assert [unit_count(64, 2.0**-i) for i in range(5)] == [64, 32, 16, 8, 4]


def test_submodels_keep_their_attributes():
    model, _, widths = traced_net("strange")
    small = build(widths, model, widths.prefix(0.5))
    assert small.dw.groups == small.dw.in_channels == small.dw.out_channels == small.dw.weight.shape[0]
    assert small.grouped.groups == 4
    assert small.gate.in_features == small.norm.num_features == small.dw.weight.shape[0]
