"""Every extraction with every aggregation on real digits, and what a run's result may depend on."""

from __future__ import annotations

import itertools

import pytest
import torch

from helpers.runs import AGGREGATIONS, EXTRACTIONS, TINY, run, tuned
from helpers.states import same
from hetfl.aggregation.updates import Updates
from hetfl.hooks.manager import PluginManager
from hetfl.rounds.loop import Rounds


@pytest.mark.parametrize(("extract", "aggregate"), list(itertools.product(EXTRACTIONS, AGGREGATIONS)))
def test_any_pair_is_finite_deterministic_and_moves_only_what_is_covered(extract, aggregate, tmp_path, monkeypatch):
    moves, updates = [], []
    recover, whole = PluginManager.recover, Rounds.aggregate_train

    def recovered(self, *given):
        updates.extend(found := recover(self, *given))
        return found

    def watched(self, *given):
        updates.clear()
        before = self.server.state
        whole(self, *given)
        if updates:
            all_of_them = Updates(updates, before)
            covered = {name: all_of_them.column(name)[1].amax(0) > 0 for name in all_of_them.averaged()}
            moves.append({name: (self.server.state[name] != before[name], covered[name]) for name in covered})

    monkeypatch.setattr(PluginManager, "recover", recovered)
    monkeypatch.setattr(Rounds, "aggregate_train", watched)
    values = {**TINY, **tuned(extract, aggregate, 2)}
    one, summary = run(tmp_path / "1", workers=1, **values)
    monkeypatch.undo()
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
