"""Named random streams: every draw belongs to a (seed, purpose, round, client), never to a thread or an order of calls."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def seed_of(seed: int | str, purpose: str, round: int = 0, client: int = -1) -> int:
    """63-bit seed of one named stream; equal arguments give equal seeds on every machine."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{round}/{client}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def stream(seed: int | str, purpose: str, round: int = 0, client: int = -1) -> torch.Generator:
    """A CPU generator at the start of the stream (seed, purpose, round, client)."""
    return torch.Generator().manual_seed(seed_of(seed, purpose, round, client))


def secret_normal(key: bytes, purpose: str, round: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers of `shape`, float64, that nobody without `key` (32 random bytes) can foresee or take off again.

    `stream` will not do for that: of a seed torch's generator takes 32 bits, which can be tried one by one. SHAKE-256 of the key
    and the purpose gives the bits, Box and Muller's method the numbers.
    """
    pairs = -(-math.prod(shape) // 2)
    bits = hashlib.shake_256(key + f"/{purpose}/{round}".encode()).digest(16 * pairs)
    whole = torch.frombuffer(bytearray(bits), dtype=torch.int64) if pairs else torch.zeros(0, dtype=torch.int64)
    radius, angle = (((whole >> 11) & (1 << 53) - 1).double() + 0.5).mul_(2**-53).view(2, pairs)
    radius, angle = radius.log().mul_(-2).sqrt_(), angle.mul_(2 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[: math.prod(shape)].view(shape)
