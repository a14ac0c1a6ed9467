"""Named random streams: every draw belongs to a (seed, purpose, round, client), never to a thread or an order of calls."""

from __future__ import annotations

import hashlib

import torch


def seed_of(seed: int, purpose: str, round: int = 0, client: int = -1) -> int:
    """63-bit seed of one named stream; equal arguments give equal seeds on every machine."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{round}/{client}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stream(seed: int, purpose: str, round: int = 0, client: int = -1) -> torch.Generator:
    """A CPU generator at the start of the stream (seed, purpose, round, client)."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, round, client))
