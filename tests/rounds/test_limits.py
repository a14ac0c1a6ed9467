"""One client's finite numbers, words or mistakes ruin nothing: it is left out by name, and the run goes on."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.faults import changed, with_bad
from hetfl.aggregation.updates import Merged
from hetfl.hooks.values import ExtraSpec
from hetfl.rounds import loop
from hetfl.rounds.limits import COUNTS, LARGEST_CHANGE, Limits
from hetfl.rounds.loop import run_round
from hetfl.rounds.validation import measure_change
from hetfl.training.task import Reply


def big(value):
    return changed(state=lambda r: {n: torch.full_like(t, value) if t.is_floating_point() else t for n, t in r.state.items()})


def scaled(factor):
    return changed(state=lambda r: {n: t * factor if t.is_floating_point() else t for n, t in r.state.items()})


FAULTS = {
    "1e30": (big(1e30), "changed its weights by"),
    "1e10": (big(1e10), "changed its weights by"),
    "3.4e38": (big(3.4e38), "changed its weights by"),
    "a thousand times": (scaled(1000), "changed its weights by"),
    "2**40 examples": (changed(examples=lambda r: 2**40), "examples"),
    "no state": (changed(state=lambda r: None), ""),
    "no extras": (changed(extras=lambda r: None), ""),
    "a number for a name": (changed(metrics=lambda r: {3: 1.0}), "metrics"),
    "accuracy of 1e9": (changed(metrics=lambda r: {"own accuracy": 1e9}), "metrics"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("aggregate", ["overlap", "fedavg"])
def test_a_finite_poison_is_left_out_and_the_others_count(monkeypatch, name, aggregate):
    spoil, sentence = FAULTS[name]
    made = with_bad(monkeypatch, spoil, aggregate=aggregate, rounds=2)
    for number in (1, 2):
        run_round(made.state, number, made.engine)
    faults = [(row["round"], row["client"], row["fault"]) for row in made.state.client_rows if "fault" in row]
    assert [(number, client) for number, client, _ in faults] == [(1, 1), (2, 1)]
    assert all(sentence in fault for _, _, fault in faults)
    assert all(bool(torch.isfinite(t).all()) for t in made.server.state.values())
    assert math.isfinite(made.state.rows[-1]["global@test loss"])


def fault(state, sent, limits=None, examples=10):
    """Why a client is left out that was sent `sent` and came back with `state`."""
    return (limits or Limits(None, [])).fault(Reply(state, examples), measure_change(state, sent))


def test_negative_variances_are_refused():
    sent = {"bn.running_var": torch.ones(2)}
    assert "negative" in fault({"bn.running_var": torch.tensor([1.0, -1000.0])}, sent)
    assert fault({"bn.running_mean": torch.tensor([-3.0])}, {"bn.running_mean": torch.ones(1)}) is None


def test_running_statistics_may_jump_where_weights_may_not():
    sent = {"w": torch.ones(4), "bn.running_var": torch.ones(4)}
    jump = {"w": torch.ones(4), "bn.running_var": torch.full((4,), 1e4)}
    assert fault(jump, sent) is None
    assert "weights" in fault({**sent, "w": torch.full((4,), 1e4)}, sent)
    assert "statistics" in fault({**sent, "bn.running_var": torch.full((4,), 1e10)}, sent)


def test_what_began_as_zeros_may_move_whatever_it_does():
    """As the half of an adapter that alone is trained: it has no norm to go by."""
    assert fault({"w": torch.ones(4)}, {"w": torch.zeros(4)}) is None


def moved(by):
    return {"w": torch.tensor([1.0 + by])}


def test_bounds_are_learned_from_replies_without_a_fault():
    people = [{"change": 2.0, "examples": 10}] * 5 + [{"change": 1e9, "examples": 10**8, "fault": "too far"}] * 50
    limits, ones = Limits(None, people), {"w": torch.ones(1)}
    assert fault(moved(99.0), ones, limits) is None
    assert "100 is allowed" in fault(moved(101.0), ones, limits)
    assert fault(moved(1.0), ones, limits, int(COUNTS * 10)) is None
    assert "are believed" in fault(moved(1.0), ones, limits, int(COUNTS * 10) + 1)
    assert fault(moved(LARGEST_CHANGE + 1), ones)
    assert fault(moved(1e9), ones, Limits(0.0, [])) is None
    assert fault(moved(0.6), ones, Limits(0.5, []))


def test_a_model_that_computes_no_numbers_is_not_taken(simulate, monkeypatch):
    made = simulate(extract="heterofl", aggregate="overlap", rounds=2, steps=1)
    before = dict(made.server.state)
    spoilt = {n: t * 1e30 if t.ndim > 1 else t for n, t in before.items()}
    monkeypatch.setattr(made.plugins, "aggregate", lambda *_: Merged(spoilt))
    run_round(made.state, 2, made.engine)
    assert all(torch.equal(made.server.state[n], t) for n, t in before.items())
    assert "outputs are NaN or infinite" in made.state.rows[-1]["alarms"]


def test_a_reply_that_a_plugin_cannot_recover_is_its_clients_fault(simulate, monkeypatch):
    made = simulate(extract="heterofl", aggregate="overlap", rounds=1, steps=0, levels="1")
    whole = type(made.plugins).recover

    def recover(self, server, replies, round):
        for update in whole(self, server, replies, round):
            if update.client == 1:
                raise KeyError("labels")
            yield update

    monkeypatch.setattr(type(made.plugins), "recover", recover)
    now = loop.run_round(made.state, 1, made.engine)
    assert {i for i, row in now.row.clients.items() if row.fault} == {1}
    assert "could not be recovered: KeyError" in now.row.clients[1].fault


def test_extras_are_admitted_by_dims_range_and_finiteness():
    spec = ExtraSpec(10, ndim=1, low=0.0, high=1.0)
    assert spec.admits(torch.tensor([0.0, 1.0]))
    for bad in (torch.zeros(1, 2), torch.tensor([2.0]), torch.tensor([-1.0]), torch.tensor([math.nan]), torch.zeros(11), "x", None):
        assert not spec.admits(bad)
    assert not ExtraSpec(10).admits(torch.tensor([math.inf]))
    assert ExtraSpec(10, torch.bool).admits(torch.tensor([True]))


def test_a_model_spoilt_after_the_merge_is_the_one_before_the_round_again(simulate, monkeypatch):
    made = simulate(extract="heterofl", aggregate="overlap", rounds=2, steps=1, server_finetune_steps=1)
    before = made.server.state
    monkeypatch.setattr(made.server, "train", lambda state, *_, **__: {n: t * math.nan for n, t in state.items()})
    run_round(made.state, 2, made.engine)
    assert made.server.state is before
    assert "again that of before the round" in made.state.rows[-1]["alarms"]
    assert math.isfinite(made.state.rows[-1]["global@test loss"])
