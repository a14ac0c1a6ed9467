"""What a client claims beside its weights: widths, labels, importance, scores, metrics. It is left out, and nobody else."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from helpers.faults import changed, with_bad
from hetfl.profiling.node import Profile
from hetfl.rounds import receiving
from hetfl.rounds.assignment import check_profile
from hetfl.rounds.client import ClientRuntime
from hetfl.rounds.evaluation import check_scores
from hetfl.rounds.loop import run_round
from hetfl.rounds.messages import Failure
from hetfl.rounds.norm_statistics import leave_out_extremes
from hetfl.training.task import Reply


def only_client_1_is_left_out(made, rounds=2):
    for number in range(1, rounds + 1):
        run_round(made.state, number, made.engine)
    faults = {(row["client"], row["fault"]) for row in made.state.client_rows if "fault" in row}
    assert {client for client, _ in faults} == {1}
    assert all(bool(torch.isfinite(t).all()) for t in made.server.state.values())
    return " | ".join(fault for _, fault in faults)


LABELS = {
    "missing": (changed(extras=lambda r: {}), "could not be recovered"),
    "2-D": (changed(extras=lambda r: {"labels": torch.ones(1, 10, dtype=torch.bool)}), "'labels' is undeclared or not as declared"),
    "too few": (changed(extras=lambda r: {"labels": torch.ones(3, dtype=torch.bool)}), "it marks 3 classes, not 10"),
    "no bools": (changed(extras=lambda r: {"labels": torch.ones(10)}), "not as declared"),
}


@pytest.mark.parametrize("name", LABELS)
def test_labels_of_the_masked_loss(monkeypatch, name):
    spoil, said = LABELS[name]
    made = with_bad(monkeypatch, spoil, wrap=["maskloss"])
    assert said in only_client_1_is_left_out(made)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(1, 48), torch.full((48,), math.nan), torch.full((48,), -1.0), torch.full((48,), 1e30), torch.zeros(48).double()],
)
def test_importance_of_tailorfl(monkeypatch, value):
    made = with_bad(monkeypatch, changed(extras=lambda r: {"importance": value}), extract="tailorfl", aggregate="tailorfl")
    assert "'importance'" in only_client_1_is_left_out(made)


@pytest.mark.parametrize("extract", ["scalefl", "heterofl", "tailorfl", "fedmd"])
@pytest.mark.parametrize("width", [1e-300, 0.3, 7.0, math.nan, "wide"])
def test_widths_that_the_run_does_not_have(monkeypatch, extract, width):
    whole = ClientRuntime.profile
    monkeypatch.setattr(ClientRuntime, "profile", lambda self, i, r: Profile(width) if i == 1 else whole(self, i, r))
    made = with_bad(monkeypatch, None, extract=extract, aggregate=None)
    assert "a width of" in only_client_1_is_left_out(made, 1)


def test_widths_where_any_is_allowed():
    assert isinstance(check_profile(Profile(0.3)), Profile)
    assert isinstance(check_profile(Profile(1e-300)), Failure)
    assert isinstance(check_profile(Profile(0.3), [1.0, 0.30000000000000004]), Profile)


def test_an_extraction_that_fails_on_one_client_leaves_it_out(monkeypatch):
    made = with_bad(monkeypatch, None)
    extract = type(made.plugins).extract

    def picky(self, server, clients, round):
        if any(client.id == 1 for client in clients):
            raise ZeroDivisionError("its width")
        return extract(self, server, clients, round)

    monkeypatch.setattr(type(made.plugins), "extract", picky)
    assert "no submodel could be extracted for it: ZeroDivisionError" in only_client_1_is_left_out(made, 1)


METRICS = {
    "1e9": {"own accuracy": 1e9}, "negative": {"seconds": -1e12}, "nan": {"seconds": math.nan}, "long": {"x" * 1000: 1.0},
    "huge": {"x": 10**400}, "text": {"x": "1"}, "many": {f"m{i}": 1.0 for i in range(65)}, "ours": {"bytes up": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
def test_metrics_that_cannot_be(monkeypatch, name):
    whole = ClientRuntime.train

    def train(self, client, sent, state):
        reply = whole(self, client, sent, state)
        return changed(metrics=lambda r: METRICS[name])(reply) if client == 1 else reply

    monkeypatch.setattr(ClientRuntime, "train", train)
    made = with_bad(monkeypatch, None)
    assert "metrics" in only_client_1_is_left_out(made, 1)


def test_new_names_every_round_do_not_widen_the_table_for_ever(monkeypatch):
    count = itertools.count()
    made = with_bad(monkeypatch, changed(metrics=lambda r: {f"m{next(count)}-{i}": 1.0 for i in range(60)}), rounds=4)
    assert "new names" in only_client_1_is_left_out(made, 4)
    assert len({name for row in made.state.client_rows for name in row}) < receiving.MOST_NAMES + 20
    assert all("own accuracy" in row for row in made.state.client_rows if row["client"] != 1)


def test_scores_of_an_evaluation():
    good = {"accuracy": 0.5, "loss": 3.0, "examples": 4.0}
    assert check_scores(good) == good
    for bad in ({"accuracy": 1e9}, {**good, "loss": -1.0}, {**good, "x": 1.0}, {"loss": 1.0}, {**good, "examples": math.inf},
                {**good, "accuracy": "1"}, None):  # fmt: skip
        assert check_scores(bad) == {}


class Told:
    def __init__(self):
        self.alarms = []

    def alarm(self, text):
        self.alarms.append(text)


@pytest.mark.parametrize(
    "spoilt", [Reply({"n.running_var": torch.tensor([-1000.0])}, 3), Reply({"n.running_mean": torch.tensor([1e30])}, 3),
               Reply({"n.running_mean": torch.tensor([1.0])}, 2**40)],
)  # fmt: skip
def test_extreme_statistics_of_static_passes_are_left_out(spoilt):
    from types import SimpleNamespace

    def received(client, reply):
        return SimpleNamespace(client=SimpleNamespace(id=client), reply=reply)

    good = [received(i, Reply({"n.running_mean": torch.tensor([2.0]), "n.running_var": torch.tensor([5.0])}, 3)) for i in range(3)]
    told = Told()
    assert leave_out_extremes(told, [*good, received(7, spoilt)]) == good
    assert "of client 7 are beyond belief" in told.alarms[0]
    assert leave_out_extremes(told, good) == good
    assert leave_out_extremes(told, []) == []
