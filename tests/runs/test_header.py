"""The head of a run: what is trained, on what, by whom, and what looks wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import hetfl

SMALL = {
    "extract": "heterofl", "model": "mlp", "rounds": 1, "epochs": 1, "pretrain_steps": 20, "clients": 4, "limit": 200,
    "partition": "iid", "progress": False, "control": False,
}  # fmt: skip


class Heard:
    def __init__(self):
        self.facts, self.notes, self.phases = [], [], []

    def on_fact(self, text):
        self.facts.append(text)

    def on_note(self, text):
        self.notes.append(text)

    def on_phase(self, round, name):
        self.phases.append(name)


def started(**values):
    heard = Heard()
    run = hetfl.run(callback=heard, **{**SMALL, **values})
    return heard, run


def arrays(shape, classes=3, n=60):
    draws = np.random.default_rng(0)
    return draws.normal(size=(n, *shape)).astype("float32"), np.arange(n) % classes


def test_the_head_says_in_a_line_each_what_is_trained_on_what_by_whom():
    heard, run = started()
    model, inputs, examples, holders, pretraining, before, widths = heard.facts
    assert model == "model: mlp, 55,210 parameters, 100.0% of its entries can be cut"
    assert inputs == "inputs: 1x8x8 (channels x height x width); 10 classes"
    assert examples == "examples: 170 to train on with 4 clients, 8 + 2 with the server (to tune on, held out), 200 to test on"
    assert holders.startswith("who holds what: 42 to 43 examples of ")
    assert pretraining == "pre-training: 20 steps on the server's 8 examples (--pretrain-steps; every method alike)"
    assert widths == "widths: 1 with 1, 0.75 with 1, 0.5 with 1, 0.25 with 1 of the 4 clients of round 1 (profile levels)"
    part = run.summary["pre-training"]
    assert before == f"before round 1: global@test {part['accuracy']:.1%}"
    assert (part["steps"], part["examples"]) == (20, 8)
    assert "pretrain, step 10 of 20" in heard.phases
    assert heard.notes == []


def test_no_pre_training_is_no_part_of_the_gain():
    heard, run = started(pretrain_steps=0)
    assert not any("pre-training" in line or "before round 1" in line for line in heard.facts)
    assert "pre-training" not in run.summary


class Half(nn.Module):
    """Half of its entries are frozen: their size is fixed in the code."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 40), nn.Linear(40, 10)

    def forward(self, x):
        return self.second(self.first(x.flatten(1)).view(-1, 40))


ODD = {
    "channels last": ({"data": arrays((12, 12, 3))}, "the inputs are read as 12 channels of 12x3"),
    "one class": ({"data": arrays((1, 8, 8), classes=1), "server_data": 0}, "the data have one class, '0'"),
    "left out": ({"data": arrays((1, 8, 8), classes=10), "partition": "pathological", "classes_per_client": 1, "clients": 3,
                  "server_data": 0}, "training examples are left out by the partition: nobody holds them"),
    "frozen": ({"model": Half(), "levels": "1"}, "of the model's entries can be cut: a client of width 0.25 carries 100% of its"),
    "narrow fleet": ({"levels": "0.5:3,0.25:1"}, "no client affords the whole model: the widest of the 4 has width 0.5"),
}  # fmt: skip


@pytest.mark.parametrize("what", ODD)
def test_what_looks_wrong_is_said_at_the_start(what):
    values, sentence = ODD[what]
    heard, run = started(**{"limit": None, **values})
    assert sum(sentence in note for note in heard.notes) == 1, heard.notes
    assert any(sentence in note for note in run.summary["notes"])


def test_what_looks_right_is_not_remarked_upon():
    torch.manual_seed(0)
    heard, _ = started(data=arrays((3, 12, 12)), limit=None, levels="1")
    assert heard.notes == []
