"""Capacity as a width ratio from a fixed mix, as in HeteroFL's and FedConv's experiments (spec heterofl 2.7)."""

from __future__ import annotations

from fractions import Fraction

import torch
from pydantic import field_validator

from hetfl.core.strategy import Field, Strategy, hookimpl
from hetfl.core.types import Node, Profile


class Levels(Strategy):
    """`mix` is ratio:share, …; a ratio is the REMAINING width in (0, 1]. Shares that sum to the clients are counts."""

    mix: str = Field("1:2,0.75:3,0.5:3,0.25:2", description="ratios with counts or shares; the last takes the remainder")
    redraw: bool = Field(False, description="draw every client's level anew each round, by the shares")

    @field_validator("mix", mode="before")
    @classmethod
    def _text(cls, mix: object) -> object:
        return str(mix) if isinstance(mix, int | float) else mix

    @field_validator("mix")
    @classmethod
    def _readable(cls, mix: str) -> str:
        parse(mix)
        return mix

    @hookimpl
    def profile(self, node: Node) -> Profile:
        levels = parse(self.mix)
        if self.redraw:
            shares = torch.tensor([float(share) for _, share in levels])
            drawn = int(torch.multinomial(shares, 1, generator=node.stream("levels")))
            return Profile(levels[drawn][0])
        return Profile(deal(levels, node.clients)[node.client])


def parse(mix: str) -> list[tuple[float, Fraction]]:
    """(ratio, share) of each part of `mix`; a part without a share counts 1. Raises ValueError with what is allowed."""
    levels = []
    for part in mix.split(","):
        ratio, _, share = part.strip().partition(":")
        try:
            levels.append((float(ratio), Fraction(share or "1")))
        except ValueError as error:
            raise ValueError(f"'{part}' is not ratio:share, such as 0.5:8") from error
        if not 0 < levels[-1][0] <= 1:
            raise ValueError(f"ratio {ratio} is outside (0, 1]; a ratio is the width that remains")
        if levels[-1][1] <= 0:
            raise ValueError(f"share {share} of ratio {ratio} must be above 0")
    return levels


def deal(levels: list[tuple[float, Fraction]], clients: int) -> list[float]:
    """Every client's ratio: floor(clients * share / sum) of each in order, the rest the last ratio (spec heterofl 2.7).

    Fewer clients than the shares' sum would all get the last ratio so; they are dealt by the shares' running sum instead.
    """
    whole = sum(share for _, share in levels)
    if clients < whole:
        return [
            ratio for i, (ratio, _) in enumerate(levels) for _ in range(ends(levels, i, clients) - ends(levels, i - 1, clients))
        ]
    dealt = [ratio for ratio, share in levels for _ in range(int(clients * share / whole))]
    return dealt + [levels[-1][0]] * (clients - len(dealt))


def ends(levels: list[tuple[float, Fraction]], place: int, clients: int) -> int:
    """How many clients the levels up to `place` have together."""
    share = sum((s for _, s in levels[: place + 1]), Fraction())
    return int(clients * share / sum(s for _, s in levels))
