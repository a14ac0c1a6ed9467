"""Plans: what is taken and put back, prefixes, windows, and what clients narrow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers.elastic import STATE, WIDTHS, ratios
from helpers.modules import SplitAttention
from helpers.oracles import quick
from hetfl.models.convnets import MLP
from hetfl.models.state import tensors
from hetfl.submodel.plan import Selection, grow
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.widths import Group, prefix, window, within


def rolled(widths, ratio, start):
    return Selection(widths, {g.name: window(g, ratio, start) for g in widths.groups})


def channels(ratio, start, size=8):
    return window(Group("", size), ratio, start)


@quick
@given(ratios, st.integers(0, 70))
def test_put_of_take_is_identity_on_the_coverage(ratio, start):
    plan = rolled(WIDTHS, ratio, start)
    other = {n: t + 1 for n, t in STATE.items()}
    full, cover = grow(plan.put(plan.take(STATE)), other)
    for n, t in STATE.items():
        assert torch.equal(full[n], torch.where(cover[n] > 0, t, other[n]))
        assert int(cover[n].sum()) == plan.take(STATE)[n].numel()


def test_ratio_one_is_identity_and_round_zero_is_the_prefix():
    plan = Selection(WIDTHS, WIDTHS.select(prefix(1)))
    assert all(torch.equal(plan.take(STATE)[n], t) for n, t in STATE.items())
    for ratio in (0.25, 0.5, 0.8):
        a, b = Selection(WIDTHS, WIDTHS.select(prefix(ratio))).take(STATE), rolled(WIDTHS, ratio, 0).take(STATE)
        assert all(torch.equal(a[n], b[n]) for n in STATE)


@quick
@given(ratios, ratios)
def test_narrower_windows_of_a_round_nest(a, b):
    small, large = sorted((a, b))
    assert set(channels(small, 3, 16).tolist()) <= set(channels(large, 3, 16).tolist())


def test_window_oracles():
    """spec fedrolex 6.1 and 6.2"""
    assert channels(0.5, 0).tolist() == [0, 1, 2, 3]
    assert channels(0.5, 3).tolist() == [3, 4, 5, 6]
    assert channels(0.5, -3).tolist() == [5, 6, 7, 0]
    assert channels(0.5, 6).tolist() == [6, 7, 0, 1]
    assert channels(0.5, -6).tolist() == [2, 3, 4, 5]
    assert channels(0.6, 3, 5).tolist() == [3, 4, 0]
    seen = torch.stack([torch.bincount(channels(0.25, j), minlength=8) for j in range(8)])
    assert seen.sum(0).tolist() == [2] * 8
    assert seen[:3].sum(0).tolist() == [1, 2, 2, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("packed", [True, False])
def test_windows_of_attention_roll_from_one_head_to_the_next(packed):
    """spec fedrolex 6.5: E = 8, 2 heads, 2 of each head, rolled by one in the code's direction: [[7, 0], [3, 4]]"""
    model = nn.MultiheadAttention(8, 2, batch_first=True) if packed else SplitAttention(8, 2)
    net = nn.Sequential(nn.Embedding(5, 8), SelfAttention(model), nn.Linear(8, 3))
    widths = trace(net, torch.randint(0, 5, (2, 7)))
    plan, state = rolled(widths, 0.5, -1), tensors(net)
    kept = [7, 0, 3, 4]
    small = plan.take(state)
    if packed:
        rows = state["1.attention.in_proj_weight"].unflatten(0, (3, 8))[:, kept].flatten(0, 1)[:, kept]
        assert torch.equal(small["1.attention.in_proj_weight"], rows)
    else:
        into = plan.index["1.attention.q.weight"][1]
        for name in "qkv":
            assert torch.equal(small[f"1.attention.{name}.weight"], state[f"1.attention.{name}.weight"][kept][:, into])
        assert plan.index["1.attention.out.weight"][1].tolist() == kept
    full, cover = grow(plan.put(small), state)
    assert all(torch.equal(full[n], t) for n, t in state.items())
    assert all(int(cover[n].sum()) == small[n].numel() for n in state)


class SelfAttention(nn.Module):
    """The mean over tokens of what a token asks of all."""

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, x):
        out = self.attention(x, x, x)
        return (out[0] if isinstance(out, tuple) else out).mean(1)


def test_window_of_an_mlp():
    """spec fedrolex 6.4"""
    model = MLP(2, 1, 2, hidden=(4, 8))
    widths = trace(model, torch.randn(2, 1, 2, 2))
    plan = rolled(widths, 0.5, 1)
    state = tensors(model)
    small = plan.take(state)
    assert torch.equal(small["1.weight"], state["1.weight"][[1, 2]])
    assert torch.equal(small["3.weight"], state["3.weight"][[1, 2, 3, 4]][:, [1, 2]])
    assert small["5.weight"].shape == (2, 4)


@quick
@given(st.floats(0.1, 1), st.floats(0.1, 1), st.integers(0, 9))
def test_a_plan_narrowed_by_the_client_is_the_cut_submodel(outer, inner, seed):
    """Round trip: what the server says a narrowed plan takes is what the client has after its own cut."""
    g = torch.Generator().manual_seed(seed)
    plan = Selection(WIDTHS, WIDTHS.select(lambda n: torch.randperm(n, generator=g)[: max(1, int(n * outer))]))
    sizes = plan.sizes
    kept = {name: torch.randperm(n, generator=g)[: max(1, int(n * inner))].sort().values for name, n in sizes.items()}
    index = within(WIDTHS, sizes, kept)
    sent = plan.take(STATE)
    cut = {name: t[torch.meshgrid(*[index[name].get(d, torch.arange(n)) for d, n in enumerate(t.shape)], indexing="ij")]
           if name in index else t for name, t in sent.items()}  # fmt: skip
    narrowed = plan.narrow(kept, {})
    assert narrowed.sizes == {name: len(units) for name, units in kept.items()}
    assert all(torch.equal(narrowed.take(STATE)[name], t) for name, t in cut.items())


@quick
@given(st.integers(0, 99))
def test_masked_plans_put_back_only_what_exists(seed):
    g = torch.Generator().manual_seed(seed)
    masks = {n: torch.rand(t.shape, generator=g) > 0.5 for n, t in STATE.items() if t.ndim > 1}
    plan = Selection(WIDTHS, WIDTHS.select(torch.arange), masks)
    full, cover = grow(plan.put({n: t + 2 for n, t in plan.take(STATE).items()}), STATE)
    for n, t in STATE.items():
        assert torch.equal(cover[n] > 0, masks.get(n, torch.ones(t.shape, dtype=torch.bool)))
        assert torch.equal(full[n], torch.where(cover[n] > 0, t + 2, t))
