"""Residual blocks found in any module and proven: cut is gated off."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hetfl.models.convnets import CNN
from hetfl.models.deep_convnets import MobileNetV2, PreResNet, ResNet
from hetfl.models.sequences import Encoder
from hetfl.models.state import load_state, tensors
from hetfl.submodel.depth import Depth
from hetfl.submodel.slicing import build_submodel
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.tracing.residual import find_blocks, gated_off
from hetfl.submodel.tracing.verify import draw_values
from hetfl.submodel.widths import Widths, prefix

PICTURES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def random_state(model, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {name: draw_values(name, t, draw) for name, t in tensors(model).items()}


class Residual(nn.Module):
    """x + f(norm(x)), as a wrapper around any f."""

    def __init__(self, f, width=12):
        super().__init__()
        self.norm, self.f = nn.LayerNorm(width), f

    def forward(self, x, scale=1.0):
        return x + scale * self.f(self.norm(x))


class Places(nn.Module):
    """Adds what does not depend on its input: no block."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(1, 5, 12))

    def forward(self, x):
        return x + self.places


class Squeeze(nn.Module):
    """A block most of which is its own, with a small one within."""

    def __init__(self):
        super().__init__()
        self.big, self.small = mlp(), Residual(nn.Linear(12, 12))

    def forward(self, x):
        return x + self.big(x) + self.small(x)


def mlp():
    return nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 12))


class Net(nn.Module):
    """Blocks of every kind between layers that keep the shape but are none."""

    def __init__(self):
        super().__init__()
        self.inputs, self.places, self.plain = nn.Linear(6, 12), Places(), nn.Linear(12, 12)
        self.stage = nn.Sequential(Residual(mlp()), Residual(mlp()))  # a block by its shape, made of blocks
        self.mixed, self.tied, self.twice = Squeeze(), Residual(mlp()), Residual(mlp())
        self.looked_into, self.last = Residual(mlp()), Residual(nn.Linear(12, 12))
        self.head = nn.Linear(12, 4)
        self.head_like = self.tied.f[0]

    def forward(self, x):
        x = self.stage(torch.relu(self.plain(self.places(self.inputs(x)))))
        x = self.twice(self.twice(self.tied(self.mixed(x), scale=0.5)))
        x = self.looked_into(x) * self.looked_into.norm.eps * 1e5
        return self.head(self.last(x).mean(1)) + self.head_like(x.mean(1))[:, :4]


def test_only_what_can_be_gated_off_is_a_block():
    model, x = Net(), torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    before, state = random_state(model), torch.get_rng_state()
    load_state(model, before)
    model.train()
    assert find_blocks(model, x) == ("stage.0", "stage.1", "mixed", "last")
    assert model.training
    assert all(torch.equal(t, before[n]) for n, t in tensors(model).items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("model", "x", "number", "ratio"),
    [
        (PreResNet(4, 3, (8, 12), (3, 2)), PICTURES, 4, 0.5),
        (ResNet(4, 3, (8, 12), (2, 2)), PICTURES, 3, 1),
        (MobileNetV2(4, 3, 0.25, ((6, 16, 3, 1), (6, 24, 2, 2)), 16), PICTURES, 3, 1),
        (Encoder(4, 30, 7, 8, 3, 2), torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(2)), 3, 0.5),
        (CNN(4, 3, (4, 6)), PICTURES, 0, 1),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "",
)
def test_cut_is_gated_off_in_width_and_depth(model, x, number, ratio):
    """any subset of blocks, at any width: the cut model computes what the narrow one does with the blocks gated off"""
    blocks, widths = find_blocks(model, x), trace(model, x, verify=False) if ratio < 1 else Widths((), {}, {})
    assert len(blocks) == number
    load_state(model, random_state(model))
    kept = widths.select(prefix(ratio))
    narrow = build_submodel(widths, model.eval(), kept).eval()
    for left_out in (blocks[:1], blocks[1:], blocks) if blocks else ():
        depth = Depth(skipped=left_out)
        small = build_submodel(widths, depth.cut(model), kept).eval()
        with gated_off(narrow, left_out):
            assert torch.allclose(small(x), narrow(x), atol=1e-6)
        assert set(tensors(small)) == depth.select_names(model, tensors(model)) < set(tensors(model))
        assert not torch.allclose(small(x), narrow(x), atol=1e-3)
        small.train()(x).sum().backward()


def test_tracing_leaves_a_module_of_two_names_as_it_was():
    model, x = Net(), torch.randn(2, 5, 6)
    before = {name: t.clone() for name, t in tensors(model).items()}
    trace(model, x)
    assert all(torch.equal(t, before[name]) for name, t in tensors(model).items())
