"""What comes back from clients, checked: who misbehaves is left out and the others count."""

from __future__ import annotations

import math
import re

import pytest
import torch

from helpers.faults import boom, changed, first, quitting, with_bad
from helpers.runs import run
from hetfl.rounds import receiving, validation
from hetfl.rounds.client import ClientRuntime
from hetfl.rounds.loop import run_round
from hetfl.training.task import Reply

FAULTS = {
    "boom": (boom, "ValueError: boom"),
    "system exit": (quitting, "SystemExit"),
    "nan": (changed(state=lambda r: {**r.state, first(r): r.state[first(r)] * float("nan")}), "NaN or infinity"),
    "infinity": (changed(state=lambda r: {**r.state, first(r): r.state[first(r)] + math.inf}), "NaN or infinity"),
    "wrong name": (changed(state=lambda r: {"x": torch.ones(1), **r.state}), "not those that were sent"),
    "missing": (changed(state=lambda r: {n: t for n, t in r.state.items() if n != first(r)}), "not those that were sent"),
    "wrong shape": (changed(state=lambda r: {**r.state, first(r): r.state[first(r)][:1]}), "is (1"),
    "broadcastable": (changed(state=lambda r: {**r.state, first(r): r.state[first(r)][..., :1]}), ", not ("),
    "wrong dtype": (changed(state=lambda r: {**r.state, first(r): r.state[first(r)].double()}), "float64"),
    "too large": (changed(state=lambda r: {**r.state, first(r): torch.zeros(3000, 3000)}), "(3000, 3000)"),
    "undeclared": (changed(extras=lambda r: {"secret": torch.ones(3)}), "undeclared"),
    "wider plan": (changed(kept=lambda r: {"0": torch.arange(99)}), "units"),
    "wider masks": (changed(masks=lambda r: {first(r): torch.ones(9, 9, dtype=torch.bool)}), "no mask"),
    "negative examples": (changed(examples=lambda r: -5), "examples"),
    "no number": (changed(examples=lambda r: "many"), "examples"),
    "metrics": (changed(metrics=lambda r: {"round": 7.0}), "metrics"),
    "odd code": (changed(encoded=lambda r: {"x": torch.ones(1)}), "not those that were sent"),
    "no reply": (lambda reply: {"accuracy": 1.0}, ""),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_client_is_left_out_and_the_others_count(monkeypatch, name):
    spoil, said = FAULTS[name]
    made = with_bad(monkeypatch, spoil)
    run_round(made.state, 1, made.engine)
    rows = {row["client"]: row for row in made.state.client_rows}
    assert said in rows[1]["fault"]
    assert {i for i, row in rows.items() if "fault" not in row} == {0, 2, 3}
    assert made.state.rows[0]["left out"] == 1
    if name in ("boom", "system exit"):
        assert "Traceback" in rows[1]["traceback"]
    good = with_bad(monkeypatch, None)
    check = receiving.check_reply
    monkeypatch.setattr(receiving, "check_reply", lambda now, c, answer: None if c == 1 else check(now, c, answer))
    run_round(good.state, 1, good.engine)
    assert all(torch.equal(made.server.state[n], good.server.state[n]) for n in made.server.state)


@pytest.mark.parametrize(
    ("kept", "masks", "fault"),
    [
        ({"1": torch.tensor([0, 9])}, {}, "it kept units of group '1' that it was not sent"),
        ({"1": torch.tensor([0, 0])}, {}, "it kept units of group '1' that it was not sent"),
        ({"1": torch.tensor([], dtype=torch.long)}, {}, "it kept units of group '1' that it was not sent"),
        ({"1": torch.tensor([0.5])}, {}, "is no list of units"),
        ({"x": torch.tensor([0])}, {}, "what it kept of 'x' is no list of units of a group"),
        ({"1": torch.tensor([0, 1])}, {}, r"tensor 1.weight is \(8, 64\)"),
        ({}, {"1.weight": torch.ones(2, dtype=torch.bool)}, "its mask of '1.weight' is no mask of a tensor"),
        ({}, {"nope": torch.ones(2, dtype=torch.bool)}, "its mask of 'nope' is no mask of a tensor"),
        ({}, {"1.bias": torch.ones(8)}, "its mask of '1.bias' is no mask of a tensor"),
    ],
)
def test_a_reply_that_cut_wrongly_is_left_out(simulate, monkeypatch, kept, masks, fault):
    whole = ClientRuntime.train

    def answer(self, client, sent, state):
        reply = whole(self, client, sent, state)
        if client == 0:
            reply.kept, reply.masks = kept, masks
        return reply

    monkeypatch.setattr(ClientRuntime, "train", answer)
    made = simulate(extract="full", aggregate="overlap", vmap="off", steps=1)
    (row,) = [r for r in made.state.client_rows if "fault" in r]
    assert row["client"] == 0
    assert re.search(fault, row["fault"])


def test_a_reply_that_cut_is_compared_with_what_was_sent_though_the_model_has_moved(simulate):
    """As of a client that was at work while others were merged."""
    made = simulate(extract="full", aggregate="overlap", steps=1)
    sent = next(iter(run_round(made.state, 2, made.engine).assignments.values()))
    before, mask = sent.state["1.weight"].clone(), sent.state["1.weight"] > 0
    made.server.state = {name: t + 1 for name, t in made.server.state.items()}
    reply = Reply({**sent.state, "1.weight": before * mask}, 5, masks={"1.weight": mask})
    found = validation.ReplyValidator(made.server, made.plugins, (), 2).check(sent, reply)
    assert torch.equal(found.assignment.state["1.weight"], before * mask)
    assert found.change.whole == 0.0


def test_a_mask_wider_than_sent_is_refused():
    both, one = torch.tensor([True, True]), torch.tensor([True, False])
    assert "wider" in validation.mask_fault({"w": both}, {"w": one}, {"w": torch.zeros(2)})
    assert validation.mask_fault({"w": one}, {"w": both}, {"w": torch.zeros(2)}) is None


@pytest.mark.parametrize("spoil", ["nan", "shape", "extra"])
def test_a_bad_reply_is_left_out(tmp_path, monkeypatch, spoil):
    from hetfl.training import local as train

    whole = train.fit

    def fit(task):
        reply = whole(task)
        name = next(iter(reply.state))
        if task.client == 1 and spoil == "nan":
            reply.state[name] = reply.state[name] * float("nan")
        if task.client == 1 and spoil == "shape":
            reply.state[name] = reply.state[name][:1]
        if task.client == 1 and spoil == "extra":
            reply.extras["surprise"] = torch.zeros(3)
        return reply

    monkeypatch.setattr(train, "fit", fit)
    weights, summary = run(tmp_path / "a", extract="heterofl", aggregate="overlap", vmap="off")
    assert sum("client 1 left out" in note for note in summary["notes"]) == 2
    assert all(bool(torch.isfinite(t).all()) for t in weights.values())
