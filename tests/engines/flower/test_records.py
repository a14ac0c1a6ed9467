"""Payloads as Flower records: what goes in comes out, what is malformed is refused."""

from __future__ import annotations

import pytest
import torch
from flwr.app import ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.messages import masked_state
from helpers.states import same
from hetfl.engines.flower.records import MalformedError, RecordCodec, decode_array, encode_array
from hetfl.profiling.node import Profile
from hetfl.rounds.messages import Instruction
from hetfl.submodel import encoding
from hetfl.training.task import Reply

dtypes = st.sampled_from([torch.float32, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.int8])


often = settings(deadline=None, max_examples=40)


def tensor(shape, dtype, seed):
    found = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
    return found > 0 if dtype == torch.bool else found.abs().to(dtype)


@often
@given(st.lists(st.integers(0, 5), max_size=4), dtypes, st.integers(0, 9))
def test_an_array_comes_back_as_it_was(shape, dtype, seed):
    was = tensor(shape, dtype, seed)
    assert torch.equal(decode_array(encode_array(was)), was)
    assert torch.equal(decode_array(encode_array(was.T.contiguous().T if was.ndim == 2 else was)), was)


@often
@given(st.data())
def test_a_mutated_array_is_refused_or_is_an_array(data):
    """A byte fuzzer: never another error, never more memory than the bytes that came."""
    raw = bytearray(encode_array(tensor((4, 3), torch.float32, 0)))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))] if data.draw(st.booleans()) else raw
    try:
        found = decode_array(bytes(raw))
    except MalformedError:
        return
    assert found.numel() * found.element_size() <= len(raw)


def test_what_a_client_is_sent_comes_back_as_it_was():
    state, masks = masked_state()
    for down in (
        Instruction(3, state, {"g": 4}, None, masks, {"x": torch.ones(2)}, {"a", "c"}, True, True),
        Instruction(1, state, None, "mlp", up={"a"}, lasting={"a", "c"}),
        Instruction(1, {}, {}, encoded={"w": torch.ones(3, dtype=torch.int8), "w/step": torch.ones(1)}),
    ):
        back = RecordCodec().decode(RecordCodec().encode(down))
        assert (back.round, back.sizes, back.model, back.up, back.held, back.local, back.lasting) == (
            down.round, down.sizes, down.model, down.up, down.held, down.local, down.lasting,
        )  # fmt: skip
        assert same(back.state, down.state)
        assert same(back.masks, down.masks)
        assert same(back.extras, down.extras)
        assert same(back.encoded, down.encoded)


def test_replies_profiles_scores_and_rounds_come_back_as_they_were():
    state, masks = masked_state()
    encoded = {"d": torch.ones(3, dtype=torch.int8), "d/step": torch.ones(1)}
    reply = Reply(state, 7, {"loss": 0.5}, {"x": torch.ones(2)}, {"g": torch.tensor([0, 2])}, masks, encoded=encoded)
    back = RecordCodec().decode(RecordCodec().encode(RecordCodec().pack(reply, masks)))
    assert back.packed == {"a"}
    assert same(encoding.fill_masked(back.state, masks), state)
    assert (back.examples, back.metrics) == (7, {"loss": 0.5})
    assert same(back.extras, reply.extras)
    assert same(back.kept, reply.kept)
    assert same(back.encoded, encoded)
    assert same(back.masks, masks)
    for small in (Profile(0.5, "memory"), {"accuracy": 0.25}, {}, 4):
        assert RecordCodec().decode(RecordCodec().encode(small)) == small


def test_payloads_are_as_large_as_they_are_said_to_be():
    state, masks = masked_state()
    content = RecordCodec().encode(Instruction(1, state, {"g": 1}, None, masks, {"x": torch.ones(2)}))
    arrays = sum(len(name.encode()) + len(array.data) for name, array in content.array_records["arrays"].items())
    beside = sum(len(name.encode()) + len(v) for name, v in content.config_records["config"].items() if isinstance(v, bytes))
    assert arrays + beside == encoding.payload_bytes(state, masks) + encoding.payload_bytes({"extra/x": torch.ones(2)})
    assert encoding.payload_bytes(state, masks, positions=False) == arrays
    assert ArrayRecord(state).count_bytes() > arrays


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c.config_records.pop("config"),
        lambda c: c.array_records.pop("arrays"),
        lambda c: c.config_records["config"].__setitem__("form", "code"),
        lambda c: c.config_records["config"].__setitem__("examples", "many"),
        lambda c: c.config_records["config"].__setitem__("values", "{"),
        lambda c: c.config_records["config"].__setitem__("mask/a", b"no array"),
        lambda c: c.config_records["config"].__setitem__("shapes", '{"a": [100000, 100000]}'),
    ],
)
def test_a_spoilt_message_is_refused_in_a_sentence(spoil):
    state, masks = masked_state()
    content = RecordCodec().encode(RecordCodec().pack(Reply(state, 7, masks=masks), masks))
    spoil(content)
    with pytest.raises(MalformedError, match=r"^\w.*"):
        RecordCodec().decode(content)
