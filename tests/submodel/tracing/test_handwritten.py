"""Blocks as people write them by hand: how much of them is cut, that the cut is right, and the reasons where there is none."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.elastic import parameters
from helpers.handwritten import PICTURES, TOKENS, Attention, RMSNorm, StoredScale, TokenNet, net_of
from hetfl.models.state import load_state, tensors
from hetfl.submodel.blocks import put, take
from hetfl.submodel.slicing import build_submodel
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.tracing.verify import compare_cut, draw_units
from hetfl.submodel.widths import Axis

# elastic share of the whole net, and the share of its parameters that width 0.25 leaves
EXPECTED = {
    "q.shape[-1] ** 0.5": (0.997, 0.112),
    "math.sqrt(q.size(-1))": (0.997, 0.112),
    "torch.sqrt(torch.tensor)": (0.997, 0.112),
    "self.scale": (0.997, 0.112),
    "einsum": (0.997, 0.112),
    "sdpa(scale=)": (0.997, 0.112),
    "cosine": (0.996, 0.113),
    "bert": (0.997, 0.112),
    "grouped": (0.997, 0.116),
    "multi-query": (0.996, 0.118),
    "nanogpt": (0.979, 0.140),  # the causal mask is a buffer, and one number counts trunk and heads
    "chunks": (0.997, 0.112),
    "neox": (0.997, 0.112),
    "sliced": (0.997, 0.112),
    "falcon-rw": (0.997, 0.112),
    "falcon-7b": (0.996, 0.118),
    "falcon-40b": (0.997, 0.116),
    "gpt2": (0.997, 0.112),
    "rms": (0.991, 0.158),
    "gemma": (0.991, 0.158),
    "sum": (0.991, 0.158),
    "length": (0.991, 0.158),
    "layer norm": (0.991, 0.160),
    "torch's rms": (0.991, 0.158),
    "own linear": (0.997, 0.099),
    "lora": (0.997, 0.121),
    "swiglu": (0.998, 0.092),
    "picture norm": (0.998, 0.082),
    "response norm": (0.998, 0.082),
    "group norm": (0.998, 0.105),
    "spatial gate": (0.995, 0.084),
    "standardised": (0.999, 0.069),
    "standardised, the paper's": (0.999, 0.069),
    "scaled standardised": (0.999, 0.069),
    "weight norm": (0.999, 0.069),
}


@cache
def traced(name):
    model, x = net_of(name)
    return model, x, trace(model, x)


def test_every_block_is_measured():
    assert EXPECTED.keys() == TOKENS.keys() | PICTURES.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_elastic_share(name):
    model, _, widths = traced(name)
    small = build_submodel(widths, model, widths.prefix(0.25))
    found = (widths.elastic(), parameters(small) / parameters(model))
    assert found == pytest.approx(EXPECTED[name], abs=6e-4), widths
    assert set(widths.frozen.values()) == {"the model's output"}


@pytest.mark.parametrize("name", EXPECTED)
@given(seed=st.integers(0, 10_000))
@settings(max_examples=3, deadline=None)
def test_sliced_is_masked_and_trains(name, seed):
    model, x, widths = traced(name)
    draw = torch.Generator().manual_seed(seed)
    kept = {g.name: draw_units(g.size, draw) for g in widths.groups}
    small, error = compare_cut(widths, model, [x], kept, draw)
    assert error <= 1e-5
    small.train()(x).sum().backward()
    state, index = tensors(model), widths.index(kept)
    for n, tensor in tensors(small).items():
        grown = put(tensor, index.get(n, {}), torch.zeros_like(state[n]))
        assert torch.equal(take(grown, index.get(n, {})), tensor)
        assert grown.shape == state[n].shape


@pytest.mark.parametrize("name", ["q.shape[-1] ** 0.5", "rms", "response norm", "standardised", "falcon-40b", "weight norm"])
def test_a_wrong_cut_is_noticed(name):
    """The positions of one tensor in reverse: what is made equal on purpose hides no such thing."""
    model, x, widths = traced(name)
    kept = {g.name: torch.arange(max(2, g.size // 3)) for g in widths.groups}
    draw = torch.Generator().manual_seed(0)
    assert compare_cut(widths, model, [x], kept, draw)[1] <= 1e-5
    for tensor in ("mid.weight", "block." if name != "falcon-40b" else "block.out.weight"):
        key = next(n for n in widths.axes if n.startswith(tensor))
        wrong = {**widths.axes[key], **{d: Axis(a.groups, a.group.flip(0), a.unit.flip(0)) for d, a in widths.axes[key].items()}}
        draw = torch.Generator().manual_seed(0)
        assert compare_cut(replace(widths, axes={**widths.axes, key: wrong}), model, [x], kept, draw)[1] > 1e-3


class ThirdOfHeads(Attention):
    """As Attention at the cut width of 3."""

    def scores(self, q, k):
        return q @ k.transpose(-2, -1) / 3**0.5


class HalfNorm(RMSNorm):
    """As RMSNorm over the 12 channels that remain."""

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 12 + self.eps))


@pytest.mark.parametrize(("block", "masked"), [(Attention, ThirdOfHeads), (StoredScale, StoredScale), (RMSNorm, HalfNorm)])
def test_the_value_in_a_submodel(block, masked):
    """What the code computes of a size is that of the smaller one; what it has stored stays; a mean is over what remains."""
    torch.manual_seed(0)
    model, x = TokenNet(block()).eval(), torch.randn(2, 1, 8, 8)
    widths = trace(model, x)
    kept = widths.prefix(0.5)
    index, state = widths.index(kept), tensors(model)
    zeros = {n: put(take(t, index.get(n, {})), index.get(n, {}), torch.zeros_like(t)) for n, t in state.items()}
    with torch.no_grad():
        ours, theirs = build_submodel(widths, model, kept)(x), load_state(TokenNet(masked()).eval(), zeros)(x)
    assert torch.allclose(ours, theirs, atol=1e-6)


class Fixed(Attention):
    def split(self, x, heads):
        return x.view(x.shape[0], x.shape[1], heads, 6).transpose(1, 2)


class Halves(nn.Module):
    def forward(self, x):
        return torch.cat([x[..., 12:], x[..., :12]], -1)


class Unsent(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("places", torch.arange(24.0), persistent=False)

    def forward(self, x):
        return x * self.places


class Ordered(nn.Module):
    def forward(self, x):
        return x.cumsum(-1)


class Arange(nn.Module):
    def forward(self, x):
        return x * torch.arange(x.shape[-1])


class Exactly(nn.Module):
    def forward(self, x):
        return x * (x.shape[-1] == 24)


class Branch(nn.Module):
    def forward(self, x):
        return torch.tanh(x) if x.shape[-1] > 23 else torch.relu(x)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (Fixed, "the cut module does not run (RuntimeError: shape '[2, 8, 4, 6]' is invalid for input of size "),
        (Unsent, "'block.places' is a buffer that is not part of the state"),
        (Halves, "a part is taken by position (__getitem__) in block"),
        (Ordered, "cumsum over channels in block"),
        (Arange, "joins channels that cannot be cut in block"),
        (Exactly, "a cut changes the output: the code depends on its size or on the order of its channels"),
        (Branch, "the code takes another path when it is cut"),
    ],
)
def test_reasons_are_the_true_ones(block, reason):
    widths = trace(TokenNet(block()), torch.randn(2, 1, 8, 8))
    reasons = set(widths.frozen.values()) - {"the model's output"}
    assert len(reasons) == 1
    assert reasons.pop().startswith(reason)
    assert widths.groups
