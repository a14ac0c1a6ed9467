"""FIARSE against its spec's oracles and properties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.oracles import T, close, merged, over, quick, update
from helpers.states import sent_and_got
from hetfl.plugins.methods import fiarse

W = T([0.9, -0.5, 0.3, -0.2, 0.1, 0.05])


def test_fiarse_mask():
    """spec fiarse O1"""
    theta = fiarse.find_thresholds({"w": W}, 0.5, False)
    assert theta["w"] == T(0.3)
    assert fiarse.make_masks({"w": W}, theta)["w"].tolist() == [True, True, True, False, False, False]


def test_fiarse_bias_factor():
    """spec fiarse O2, O5"""
    assert close(fiarse.gradient_factor(W, T(0.3)), [1.375, 1.46875, 1.5, 0, 0, 0])
    assert close(fiarse.gradient_factor(T([1.0, 2, 3, 9]), T(1.0)), [1.5, 1.4444444, 1.375, 1.18])
    assert close(fiarse.gradient_factor(T([0.0, 1, -2]), T(0.0)), [1, 1, 1])


def test_fiarse_step_and_shrinking_mask():
    """spec fiarse O3"""
    w = W.clone().requires_grad_()
    (0.5 * (fiarse.apply_threshold(w, T(0.3)) - 1).square()).sum().backward()
    assert close(w.grad, [-0.1375, -2.203125, -1.05, 0, 0, 0])
    after = (w - 0.1 * w.grad).detach().requires_grad_()
    assert close(after, [0.91375, -0.2796875, 0.405, -0.2, 0.1, 0.05])
    (0.5 * (fiarse.apply_threshold(after, T(0.3)) - 1).square()).sum().backward()
    assert (after.grad != 0).tolist() == [True, False, True, False, False, False]


def test_fiarse_aggregation():
    """spec fiarse O4: a kept entry with zero change is covered, which the official code gets wrong (5.2)"""
    x = T([0.9, -0.5, 0.3, -0.2])
    one = update(1, (x - T([0.1, -0.1, 0.2, 0.4])).tolist(), mask=[1, 1, 1, 1])
    two = update(2, (x - T([0.3, 0, 0, 0])).tolist(), mask=[1, 0, 0, 0])
    assert close(merged(fiarse.FIARSEMean(), over(x.tolist(), one, two)).state["v"], [0.7, -0.4, 0.1, -0.6])
    still = update(2, (x - T([0.3, 0, 0, 0])).tolist(), mask=[1, 1, 0, 0])
    assert close(merged(fiarse.FIARSEMean(), over(x.tolist(), one, still)).state["v"], [0.7, -0.45, 0.1, -0.6])
    assert close(merged(fiarse.FIARSEMean(rate=0.5), over(x.tolist(), one, two)).state["v"], [0.8, -0.45, 0.2, -0.4])


@quick
@given(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.1, 10), st.integers(0, 99))
def test_fiarse_masks_nest_and_do_not_depend_on_scale(a, b, scale, seed):
    """spec fiarse properties"""
    weights = {n: torch.randn(s, generator=torch.Generator().manual_seed(seed)) for n, s in (("a.w", (7, 5)), ("b.w", (11,)))}
    small, large = sorted((a, b))
    for stages in (False, True):
        inner, outer, scaled = (
            fiarse.make_masks(w, fiarse.find_thresholds(w, gamma, stages))
            for w, gamma in ((weights, small), (weights, large), ({n: t * scale for n, t in weights.items()}, small))
        )
        assert all(bool((outer[n] | ~inner[n]).all()) and torch.equal(inner[n], scaled[n]) for n in weights)
    kept = sum(int(m.sum()) for m in fiarse.make_masks(weights, fiarse.find_thresholds(weights, small, False)).values())
    assert kept == max(1, int(small * 46 + 1e-9))
    bias = fiarse.gradient_factor(weights["a.w"], T(0.3))
    assert bool(((bias == 0) | ((bias > 1) & (bias <= 1.5))).all())


def test_fiarse_changes_nothing_outside_its_mask(simulate, monkeypatch):
    """spec fiarse properties"""
    seen = sent_and_got(monkeypatch)
    simulate(extract="fiarse", aggregate="fiarse")
    assert seen
    for client, _, before, after, masks in seen:
        assert bool(masks)
        assert all(torch.equal(after[n][~m], before[n][~m]) for n, m in masks.items())
        if client == 1:
            assert any(int((~m).sum()) for m in masks.values())


def test_fiarse_of_full_budgets_without_its_bias_is_fedavg(simulate):
    """spec fiarse properties"""
    ours = simulate(extract="fiarse", aggregate="fiarse", levels="1", set={"extract": {"fiarse": {"biased": False}}})
    theirs = simulate(extract="full", aggregate="overlap", levels="1")
    assert all(torch.allclose(ours.server.state[n], t, atol=1e-6) for n, t in theirs.server.state.items())
    biased = simulate(extract="fiarse", aggregate="fiarse", levels="1")
    assert not all(torch.allclose(biased.server.state[n], t, atol=1e-6) for n, t in theirs.server.state.items())


@pytest.mark.parametrize("by", ["layer", "neuron"])
def test_other_granularities_of_fiarse(simulate, by):
    made = simulate(extract="fiarse", aggregate="fiarse", set={"extract": {"fiarse": {"by": by}}})
    plan = made.last.assignments[1].plan
    assert (plan.sizes == {"1": 4, "3": 3}) == (by == "neuron")
    assert bool(plan.masks) == (by == "layer")
