"""LotteryFL against its spec's oracles and properties."""

from __future__ import annotations

import pytest
import torch

from helpers.oracles import T, over, update
from helpers.states import sent_and_got
from hetfl.aggregation.mean import mean
from hetfl.plugins.methods import lotteryfl, pruning


def test_lottery_prune():
    """spec lotteryfl O1"""
    w = T([0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1.0])
    once = lotteryfl.prune_smallest(w, None, 0.2)
    assert once.tolist() == [False] * 2 + [True] * 8
    twice = lotteryfl.prune_smallest(w * once, once, 0.2)
    assert twice.tolist() == [False] * 4 + [True] * 6


def test_lottery_ties_survive():
    assert lotteryfl.prune_smallest(torch.ones(10), None, 0.2).all()


@pytest.mark.parametrize(
    ("target", "clamp", "prunes", "end"),
    [
        (0.1, False, 11, 0.085899), (0.5, False, 4, 0.4096), (0.3, False, 6, 0.262144), (0.8, False, 1, 0.8),
        (0.64, False, 2, 0.64), (0.1, True, 11, 0.1), (0.3, True, 6, 0.3), (0.6, True, 3, 0.6), (None, True, 2, 0.64),
    ],
)  # fmt: skip
def test_lottery_schedule(simulate, monkeypatch, target, clamp, prunes, end):
    """spec lotteryfl O2, round by round: a client that has reached its target neither prunes nor rewinds any more"""
    seen = sent_and_got(monkeypatch)
    monkeypatch.setattr(pruning, "hold_out_and_score", lambda task: 1.0)
    options = {"lotteryfl": {"target": target, "clamp": clamp}}
    made = simulate(prunes + 3, extract="lotteryfl", aggregate="overlap", set=options, clients=1, levels="0.8")
    first, entries, rewound = made.initial["1.weight"], 512, []
    for _, round, before, _, masks in seen:
        left = int(masks["1.weight"].sum())
        assert left < entries if round <= prunes else left == entries
        entries = left
        rewound.append(torch.equal(before["1.weight"], first * masks["1.weight"]))
    assert rewound == [True] * prunes + [False] * 3
    assert made.engine.client_states()[0]["memory"]["remaining"].item() == pytest.approx(end, abs=1e-6)


def test_lottery_aggregation():
    """spec lotteryfl O3"""
    updates = over([9.0, 9, 9], update(1, [1.0, 2, 0], mask=[1, 1, 0]), update(2, [3.0, 0, 0], mask=[1, 0, 0]))
    assert mean(updates, [1.0, 1.0])["v"].tolist() == [2, 2, 9]
    assert mean(over([5.0], update(1, [1.0]), update(2, [3.0])), [1.0, 1.0])["v"].tolist() == [2]


def test_lottery_rewinds_to_the_first_model_and_keeps_dead_weights_dead(simulate, monkeypatch):
    """spec lotteryfl O4, O5 and properties"""
    seen = sent_and_got(monkeypatch)
    monkeypatch.setattr(pruning, "hold_out_and_score", lambda task: 1.0)
    made = simulate(extract="lotteryfl", aggregate="overlap", levels="0.5", set={"lotteryfl": {"target": 0.6}})
    first, masks = made.state.initial, {}
    remaining = {1: 0.8, 2: 0.64, 3: 0.512}
    for client, round, before, after, mask in seen:
        assert set(mask) == {"1.weight", "3.weight", "5.weight"}
        for name, m in mask.items():
            assert torch.equal(before[name], first[name] * m)
            assert after[name][~m].eq(0).all()
            assert bool((masks.get((client, name), m) | ~m).all())
            assert float(m.float().mean()) == pytest.approx(remaining[round], abs=0.03)
            masks[client, name] = m
        assert torch.equal(before["1.bias"], first["1.bias"])


def test_lottery_does_not_prune_at_the_threshold_itself(simulate, monkeypatch):
    """spec lotteryfl O5"""
    monkeypatch.setattr(pruning, "hold_out_and_score", lambda task: 0.4)
    for threshold, pruned in ((0.4, False), (0.39, True)):
        made = simulate(
            extract="lotteryfl", aggregate="overlap", levels="0.5", steps=1, set={"lotteryfl": {"threshold": threshold}}
        )
        assert bool(made.last.assignments[0].plan.masks) == pruned


def test_a_client_met_late_gets_the_first_model_too(simulate):
    made = simulate(extract="lotteryfl", aggregate="overlap", fraction=0.34, rounds=4, set={"lotteryfl": {"threshold": 0.0}})
    late = [
        row
        for row in made.state.client_rows
        if row["round"] == min(r["round"] for r in made.state.client_rows if r["client"] == row["client"])
    ]
    first = next(row for row in late if row["round"] == 1)
    assert any(row["bytes down"] > 1.5 * first["bytes down"] for row in late if row["round"] > 1)
    for client, state in made.engine.client_states().items():
        assert torch.equal(state["memory"]["initial/1.weight"], made.state.initial["1.weight"]), client
