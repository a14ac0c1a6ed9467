"""Tensors as they travel: bytes."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord

from hetfl.submodel import encoding


def test_bytes_are_those_of_the_encoded_payload():
    state = {"w": torch.zeros(3, 4, 5), "b": torch.zeros(7), "seen": torch.tensor(3), "mask": torch.ones(9, dtype=torch.bool)}
    assert encoding.payload_bytes(state) == ArrayRecord(state).count_bytes()
