"""Every extraction with every aggregation on real digits, and what a run's result may depend on."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from helpers.runs import AGGREGATIONS, EXTRACTIONS, TINY, run, tuned
from helpers.states import same
from hetfl.aggregation.updates import Updates
from hetfl.rounds import loop

TRAINING = {"heterofl", "fjord", "scalefl", "fiarse", "hermes", "lotteryfl", "tailorfl", "fedmd"}  # that change it, and two others


def list_pairs():
    """All pairs; those with `fedproto` whose extraction leaves training alone are slow; `fedtgp`, the same to clients, has two."""
    for extract, aggregate in itertools.product(EXTRACTIONS, AGGREGATIONS):
        if aggregate != "fedtgp" or extract in ("heterofl", "fedmd"):
            slow = aggregate == "fedproto" and extract not in TRAINING
            yield pytest.param(extract, aggregate, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("extract", "aggregate"), list(list_pairs()))
def test_any_pair_is_finite_deterministic_and_moves_only_what_is_covered(extract, aggregate, tmp_path, monkeypatch):
    moves, whole = [], loop.aggregate_updates

    def watched(now, updates):
        seen, before = [], now.run.server.state

        def noted():
            for update in updates:
                patches = {n: replace(p, values=p.values.clone()) for n, p in update.patches.items()}  # sums may take them over
                seen.append(replace(update, patches=patches))
                yield update

        merged = whole(now, noted())
        if seen and merged is not None:
            everybody = Updates(seen, before)
            covered = {name: everybody.column(name)[1].amax(0) > 0 for name in everybody.averaged()}
            moves.append({name: (merged.state[name] != before[name], covered[name]) for name in covered})
        return merged

    monkeypatch.setattr(loop, "aggregate_updates", watched)
    values = {**TINY, **tuned(extract, aggregate, 2)}
    one, summary = run(tmp_path / "1", workers=1, **values)
    monkeypatch.undo()
    if (EXTRACTIONS.index(extract) + AGGREGATIONS.index(aggregate)) % 3 == 0:  # every plugin is in some of these
        two, again = run(tmp_path / "2", workers=2, **values)
        assert same(one, two)
        assert summary["accuracy"] == again["accuracy"]
    assert not any("left out" in note for note in summary["notes"])
    assert all(bool(torch.isfinite(t).all()) for t in one.values())
    assert not any(bool((moved & ~covered).any()) for round in moves for moved, covered in round.values())
    for round in moves:
        if any(bool(covered.any()) for _, covered in round.values()):
            assert any(bool(moved.any()) for moved, _ in round.values())
    assert bool(moves) == (extract != "serveralone")


def test_untuned_fedconv_and_kld_are_heterofl_and_overlap_exactly(tmp_path):
    """findings 6.6 and 0.2: with zero tuning steps they are HeteroFL's samples-weighted overlap mean."""
    ours, _ = run(tmp_path / "a", **tuned("fedconv", "kld", 0))
    theirs, _ = run(tmp_path / "b", extract="heterofl", aggregate="overlap", set={"overlap": {"weighting": "samples"}})
    assert same(ours, theirs)


def test_all_levels_one_and_weights_one_are_fedavg_exactly(tmp_path):
    """findings 6.6: all clients whole and w = 1 give FedAvg."""
    values = tuned("fedconv", "kld", 0)
    values["set"]["levels"] = {"mix": "1"}
    ours, _ = run(tmp_path / "a", **values)
    theirs, _ = run(tmp_path / "b", extract="full", aggregate="fedavg", levels="1")
    assert same(ours, theirs)


def test_the_seed_matters_and_the_partition_seed_is_apart(tmp_path):
    values = {"extract": "heterofl", "aggregate": "overlap", "rounds": 1}
    base, _ = run(tmp_path / "a", **values)
    assert not same(base, run(tmp_path / "b", seed=1, **values)[0])
    assert not same(base, run(tmp_path / "c", partition_seed=1, **values)[0])


@pytest.mark.parametrize("extract", EXTRACTIONS)
def test_clients_may_come_late_and_change_their_capacity(extract, tmp_path):
    values = {**TINY, **tuned(extract, None, 2), "fraction": 0.5, "rounds": 4, "levels": "1,0.5"}
    values["set"] = {**values["set"], "levels": {"redraw": True}}
    one, summary = run(tmp_path / "1", workers=1, **values)
    two, _ = run(tmp_path / "2", workers=2, **values)
    assert same(one, two)
    assert not any("left out" in note for note in summary["notes"])
    assert all(bool(torch.isfinite(t).all()) for t in one.values())
