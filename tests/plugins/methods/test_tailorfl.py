"""TailorFL against its spec's oracles and properties."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from helpers.elastic import STATE, WIDTHS
from helpers.oracles import T, close, merged, over, server_with, update
from helpers.states import same
from hetfl.plugins.methods import tailorfl
from hetfl.rounds.loop import run_round
from hetfl.submodel.plan import Selection, grow


def test_tailor_ratio():
    """spec tailorfl O1: capacity is the width squared"""
    found = [tailorfl.ratio(capacity**0.5, 1 / 16) for capacity in (1, 0.5, 0.25, 0.1, 1 / 64)]
    assert found == [1, 0.6875, 0.5, 0.3125, 0.125]


def test_tailor_ratio_never_exceeds_the_capacity():
    for step in (1 / 16, 0.25, 0.3, 0.7):
        grid = [1 - k * step for k in range(17)]
        for width in (1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.01):
            p = tailorfl.ratio(width, step)
            assert p == pytest.approx(max((g for g in grid if 1e-9 < g <= width + 1e-9), default=width))
            assert 0 < p <= width + 1e-9
    assert tailorfl.ratio(0.2, 0.3) == pytest.approx(0.1)


def test_tailor_similarity():
    """spec tailorfl O2"""
    a, b = T([1, 0.5, 0.2, 0.1]), T([0.9, 0.6, 0.1, 0.2])
    alike = tailorfl.similarities(torch.stack([a, b, 1 - a, torch.ones(4)]))
    assert alike[0, 1].item() == pytest.approx(0.959353, abs=1e-6)
    assert alike[0, 2].item() == pytest.approx(-1)
    assert alike[3].tolist() == [0, 0, 0, 1]


def test_tailor_scaling_round_trip():
    """spec tailorfl O3"""
    kept = WIDTHS.select(lambda n: torch.arange(max(1, int(n * 0.6875))))
    plan = tailorfl.ScaledSelection(WIDTHS, kept, p=0.6875)
    small = plan.take(STATE)
    assert any(not torch.equal(small[n], Selection(WIDTHS, kept).take(STATE)[n]) for n in small)
    full, cover = grow(plan.put(small), {n: t + 1 for n, t in STATE.items()})
    assert all(close(full[n], torch.where(cover[n] > 0, t, t + 1)) for n, t in STATE.items())


def test_tailor_weighted_overlap():
    """spec tailorfl O4"""
    server = server_with(c1=0.5, c2=1.0)
    a, b = update(1, [2.0, 2, 0], 10.0, mask=[1, 1, 0]), update(2, [5.0, 0, 0], 20.0, mask=[1, 0, 0])
    assert merged(tailorfl.TailorFLMean(), over([9.0, 9, 9], a, b), server).state["v"].tolist() == [3.5, 2, 9]


def test_tailor_counts_a_client_by_the_ratio_that_it_was_sent(simulate):
    """The step of the grid is one option, the extraction's; with another extraction a client counts by its width"""
    made = simulate(extract="tailorfl", aggregate="tailorfl", levels="1,0.6,0.6", set={"extract": {"tailorfl": {"step": 0.25}}})
    assert [sent.plan.p for sent in made.last.assignments.values()] == [1, 0.5, 0.5]
    assert "step" not in tailorfl.TailorFLMean.model_fields
    for says, mean in ((True, (10 / 0.25 * 2 + 20 / 0.5 * 5) / 80), (False, (10 / 0.5 * 2 + 20 * 5) / 40)):
        both = [(update(1, [2.0], 10.0), 0.25), (update(2, [5.0], 20.0), 0.5)]
        updates = [replace(u, extras={"p": T(p)} if says else {}) for u, p in both]
        got = merged(tailorfl.TailorFLMean(), over([9.0], *updates), server_with(c1=0.5, c2=1.0))
        assert got.state["v"].item() == pytest.approx(mean)


def test_tailor_swap():
    """spec tailorfl O5"""
    lists = [T([0, 1]), T([2, 3])]
    assert tailorfl.swap_filters(0, lists, T([1.0, 1.0]), 4, 0.05).tolist() == [1, 2]
    assert tailorfl.swap_filters(0, lists, T([1.0, -1.0]), 4, 0.05).tolist() == [0, 1]
    assert tailorfl.swap_filters(0, [T([0, 1, 2, 3]), T([2, 3])], T([1.0, 1.0]), 4, 0.5).tolist() == [0, 1, 2, 3]


def test_tailor_regulariser():
    """spec tailorfl O6"""
    u = {"a": torch.ones(3, requires_grad=True), "b": torch.ones(1, requires_grad=True)}
    (0.5 * tailorfl.mean_square(u)).backward()
    assert close(u["a"].grad, [0.25] * 3)


def test_tailor_keeps_capacity_and_shares_its_lower_groups(simulate):
    """spec tailorfl properties"""
    made = simulate(
        extract="tailorfl", aggregate="tailorfl", rounds=5, steps=0, set={"extract": {"tailorfl": {"steps": 2, "tune": 0.5}}}
    )
    for round in range(1, 6):
        last = run_round(made.state, round, made.engine)
        plans = {client: sent.plan for client, sent in last.assignments.items()}
        if round == 1:
            assert all(row["bytes up"] < row["bytes down"] / 3 for row in made.state.client_rows)
            assert same(made.server.state, made.state.initial)
            continue
        assert plans[1].sizes == plans[2].sizes == {"1": 4, "3": 3}
        assert torch.equal(plans[1].kept["1"], plans[2].kept["1"])
    assert not same(made.server.state, made.state.initial)


def test_tailor_learns_importance_of_a_model_in_evaluation_mode(simulate, monkeypatch):
    """spec tailorfl 1: the model is frozen, its batch norm's statistics and its dropout too"""
    modes, call = [], tailorfl.functional_call
    monkeypatch.setattr(tailorfl, "functional_call", lambda model, *given: modes.append(model.training) or call(model, *given))
    simulate(1, extract="tailorfl", aggregate="tailorfl", set={"extract": {"tailorfl": {"steps": 2}}})
    assert modes == [False] * 6


def test_importance_of_another_length_is_not_taken():
    server = SimpleNamespace(widths=WIDTHS)
    for length, known in ((3, set()), (sum(g.size for g in WIDTHS.groups), {1})):
        plugin, answer = tailorfl.TailorFL(), SimpleNamespace(extras={"importance": torch.rand(length)})
        reply = SimpleNamespace(client=SimpleNamespace(id=1), reply=answer, plan=None, update=lambda: update(1, [0.0]))
        assert len(list(plugin.recover(server, [reply]))) == 1
        assert set(plugin._importance) == known
