"""Replies mutated at random: none is taken that is not what was asked for, and none ends a run."""

from __future__ import annotations

import copy
import json
import random

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetfl.config import resolve
from hetfl.engines.flower.records import MalformedError, RecordCodec
from hetfl.rounds.assignment import assign_submodels, profile_clients, sample_clients
from hetfl.rounds.evaluation import check_scores
from hetfl.rounds.messages import Failure
from hetfl.rounds.receiving import instruct
from hetfl.rounds.reporting import NoCallback
from hetfl.rounds.state import RoundState
from hetfl.rounds.validation import ReplyValidator
from hetfl.runs.experiment import prepare

TINY = {
    "limit": 150, "clients": 2, "rounds": 1, "epochs": 1, "pretrain_steps": 0, "levels": "0.5:1", "control": False,
    "vmap": "off", "model": "mlp", "model_args": {"hidden": [8]},
}  # fmt: skip


def round_of(extract, aggregate, **more):
    """What a server sent in a round, its validator, and a good reply as it travels."""
    made = prepare(resolve({**TINY, "extract": extract, "aggregate": aggregate, **more}), NoCallback())
    now = RoundState(made.state, 1, made.engine)
    now.assignments = assign_submodels(now, profile_clients(now, sample_clients(now)))
    sent = now.assignments[0]
    reply = dict(made.engine.ask("train", {0: instruct(now, sent)}))[0]
    content = RecordCodec().encode(RecordCodec().pack(reply, sent.plan.masks))
    return sent, ReplyValidator(made.server, made.plugins, made.state.at_home, 1), content


@pytest.fixture(scope="module")
def rounds():
    return [
        round_of("heterofl", "overlap"),
        round_of("fiarse", "overlap"),
        round_of("hermes", "hermes"),
        round_of("heterofl", "overlap", wrap=("topk",)),
    ]


def sound(taken):
    """A reply that was taken has the names, shapes and types that were asked for, and finite values."""
    if taken.fault is not None:
        assert isinstance(taken.fault, str)
        assert taken.fault
        return False
    for name, tensor in taken.reply.state.items():
        like = taken.assignment.state[name]
        assert tensor.shape == like.shape
        assert tensor.dtype == like.dtype
        assert torch.isfinite(tensor).all() or not tensor.is_floating_point()
    assert taken.reply.examples >= 0
    return True


def take(validator, sent, content):
    try:
        answer = RecordCodec().decode(content)
    except MalformedError as error:
        answer = Failure(str(error))
    return validator.check(sent, answer)


def test_the_good_reply_is_taken(rounds):
    for sent, validator, content in rounds:
        assert sound(take(validator, sent, content))


ODD = [float("nan"), float("inf"), -1, 0, 2**62, -(2**62), "", "x" * 300, b"", b"\x93NUMPY", True, 1.5, json.dumps({"a": [-1]})]


def spoilt(array, random):
    """An array with some bytes changed or cut off."""
    found, raw = copy.copy(array), bytearray(array.data)
    for _ in range(random.randrange(1, 5) if raw else 0):
        raw[random.randrange(len(raw))] = random.randrange(256)
    found.data = bytes(raw[: random.randrange(len(raw) + 1)]) if random.random() < 0.2 else bytes(raw)
    return found


def mutate(content, random):
    """One thing of a message changed: a value, a name, a byte of an array, a record."""
    made = RecordDict(dict(content.items()))
    config, arrays = ConfigRecord(dict(content.config_records["config"])), dict(content.array_records["arrays"])
    kind = random.randrange(7)
    if kind == 0:
        config[random.choice(list(config))] = random.choice(ODD)
    elif kind == 1:
        del config[random.choice(list(config))]
    elif kind == 2:
        config[random.choice(["mask/0.weight", "kept/0", "extra/x", "scale/0.weight", "shapes", "code", "values"])] = random.choice(
            ODD
        )
    elif kind == 3 and arrays:
        name = random.choice(list(arrays))
        arrays[name] = spoilt(arrays[name], random)
    elif kind == 4 and arrays:
        del arrays[random.choice(list(arrays))]
    elif kind == 5 and arrays:
        name = random.choice(list(arrays))
        arrays[name + "x"] = arrays.pop(name)
    elif arrays:
        a, b = random.choice(list(arrays)), random.choice(list(arrays))
        arrays[a], arrays[b] = arrays[b], arrays[a]
    made["config"], made["arrays"] = config, ArrayRecord(arrays)
    return made


def fuzz(rounds, tries, seed):
    drawn, taken = random.Random(seed), 0
    for _ in range(tries):
        sent, validator, content = drawn.choice(rounds)
        for _ in range(drawn.randrange(1, 4)):
            content = mutate(content, drawn)
        taken += sound(take(validator, sent, content))
    return taken


def test_mutated_replies_are_sound_or_refused(rounds):
    assert 0 < fuzz(rounds, 600, 0) < 600


@pytest.mark.slow
def test_ten_thousand_mutated_replies(rounds):
    assert 0 < fuzz(rounds, 10_000, 1) < 10_000


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.text(max_size=12), st.one_of(st.integers(-(2**62), 2**62), st.floats(), st.text(max_size=9), st.binary()))
)
def test_any_config_is_sound_or_refused(rounds, values):
    sent, validator, content = rounds[1]
    config = {**dict(content.config_records["config"]), **{k: v for k, v in values.items() if k}}
    made = RecordDict({"arrays": content.array_records["arrays"], "config": ConfigRecord(config)})
    sound(take(validator, sent, made))


def test_a_score_without_an_accuracy_is_none():
    for said in ({"loss": 1.0}, {"accuracy": float("nan")}, {}, Failure("boom"), 3):
        assert check_scores(said) == {}
    assert check_scores({"accuracy": 0.5}) == {"accuracy": 0.5}
