"""Plans: what is taken and put back, prefixes, windows, and what clients narrow."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.elastic import STATE, WIDTHS, ratios
from helpers.oracles import quick
from hetfl.models.state import tensors
from hetfl.models.zoo import MLP
from hetfl.submodel.plan import Selection, grow, prefix, window
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.widths import within


@quick
@given(ratios, st.integers(0, 70))
def test_put_of_take_is_identity_on_the_coverage(ratio, start):
    plan = Selection(WIDTHS, WIDTHS.select(window(ratio, start)))
    other = {n: t + 1 for n, t in STATE.items()}
    full, cover = grow(plan.put(plan.take(STATE)), other)
    for n, t in STATE.items():
        assert torch.equal(full[n], torch.where(cover[n] > 0, t, other[n]))
        assert int(cover[n].sum()) == plan.take(STATE)[n].numel()


def test_ratio_one_is_identity_and_round_zero_is_the_prefix():
    plan = Selection(WIDTHS, WIDTHS.select(prefix(1)))
    assert all(torch.equal(plan.take(STATE)[n], t) for n, t in STATE.items())
    for ratio in (0.25, 0.5, 0.8):
        a, b = (Selection(WIDTHS, WIDTHS.select(choose)).take(STATE) for choose in (prefix(ratio), window(ratio, 0)))
        assert all(torch.equal(a[n], b[n]) for n in STATE)


@quick
@given(ratios, ratios)
def test_narrower_windows_of_a_round_nest(a, b):
    small, large = sorted((a, b))
    assert set(window(small, 3)(16).tolist()) <= set(window(large, 3)(16).tolist())


def test_window_oracles():
    """spec fedrolex 6.1 and 6.2"""
    assert window(0.5, 0)(8).tolist() == [0, 1, 2, 3]
    assert window(0.5, 3)(8).tolist() == [3, 4, 5, 6]
    assert window(0.5, -3)(8).tolist() == [5, 6, 7, 0]
    assert window(0.5, 6)(8).tolist() == [6, 7, 0, 1]
    assert window(0.5, -6)(8).tolist() == [2, 3, 4, 5]
    assert window(0.6, 3)(5).tolist() == [3, 4, 0]
    seen = torch.stack([torch.bincount(window(0.25, j)(8), minlength=8) for j in range(8)])
    assert seen.sum(0).tolist() == [2] * 8
    assert seen[:3].sum(0).tolist() == [1, 2, 2, 1, 0, 0, 0, 0]


def test_window_of_an_mlp():
    """spec fedrolex 6.4"""
    model = MLP(2, 1, 2, hidden=(4, 8))
    widths = trace(model, torch.randn(2, 1, 2, 2))
    plan = Selection(widths, widths.select(window(0.5, 1)))
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
