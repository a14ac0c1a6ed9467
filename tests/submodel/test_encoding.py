"""Tensors as they travel: bytes and quantisation."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from hetfl.submodel import encoding


def test_bytes_are_those_of_the_encoded_payload():
    state = {"w": torch.zeros(3, 4, 5), "b": torch.zeros(7), "seen": torch.tensor(3), "mask": torch.ones(9, dtype=torch.bool)}
    assert encoding.payload_bytes(state) == ArrayRecord(state).count_bytes()


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(["fp16", "int8"]), st.integers(0, 9), st.floats(1e-3, 1e3))
def test_what_is_quantised_comes_back_within_half_a_step(code, seed, size):
    state = {
        "a": torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) * size,
        "n": torch.tensor(4),
        "z": torch.zeros(2),
    }
    sent, scales = encoding.encode_tensors(state, code)
    back = encoding.decode_tensors(sent, scales)
    step = scales["a"] / 2 if code == "int8" else float(state["a"].abs().max()) * 2**-11
    assert (back["a"] - state["a"]).abs().max() <= step * 1.001 + 1e-6
    assert back["a"].dtype == torch.float32
    assert torch.equal(back["z"], state["z"])
    assert back["n"] == 4
    assert encoding.payload_bytes(state, code=code) < encoding.payload_bytes(state)
