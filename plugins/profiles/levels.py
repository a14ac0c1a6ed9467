"""Capacity as a width ratio from a fixed mix, as in HeteroFL's and FedConv's experiments (spec heterofl 2.7)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property

import torch
from pydantic import field_validator, model_validator

from hetfl import Field, Node, Plugin, Profile, hookimpl
from hetfl.profiling.capacity import assign_mix, parse_mix, parse_ratio

LETTERS = re.compile(r"[a-z]\d+(-[a-z]\d+)*")


class Levels(Plugin):
    """`mix` is ratio:share, …; a ratio is the REMAINING width in (0, 1], also 1/4 or 0.75^2; of a fifth of the parameters, 0.2^0.5.

    Shares that sum to the clients are counts. The papers' letters serve as well: a6-b10-c11-d18-e55, where a is 1, b 1/2, c 1/4,
    d 1/8 and e 1/16. The widest ratio is held by one client at least, however few there are: what nobody holds, nobody trains.
    Where the run's own model is narrower (--global-width), ratios stay shares of the whole: of one of width b, 1/2, a client of
    level e has 1/8, and one of level b or a everything.
    """

    mix: str = Field("1:2,0.75:3,0.5:3,0.25:2", description="ratios with counts or shares; the last takes the remainder")
    redraw: bool = Field(False, description="draw every client's level anew each round, by the shares")
    tiers: int | None = Field(
        None, ge=1, description="draw each round among the levels so many places from a client's own (NeFL: 2)"
    )

    @field_validator("mix", mode="before")
    @classmethod
    def _accept_number(cls, mix: object) -> object:
        return str(mix) if isinstance(mix, int | float) else mix

    @field_validator("mix")
    @classmethod
    def _check_mix(cls, text: str) -> str:
        parse_mix(expand_letters(text), parse_ratio)
        return text

    @model_validator(mode="after")
    def _check_tiers(self) -> Levels:
        if self.redraw and self.tiers:
            raise ValueError("redraw draws among all levels, tiers among those near a client's own; give one of the two")
        return self

    @property
    def declared_widths(self) -> list[float]:
        return [ratio for ratio, _ in self._levels]

    @hookimpl
    def profile(self, node: Node) -> Profile:
        levels = self._levels
        if self.redraw:
            share = levels[draw([float(share) for _, share in levels], node)][0]
        else:
            share = assign_mix(expand_letters(self.mix), parse_ratio, node.clients, max)[node.client]
        if self.tiers:
            own = [ratio for ratio, _ in levels].index(share)
            near = levels[max(0, own - self.tiers) : own + self.tiers + 1]
            share = near[draw([1.0] * len(near), node)][0]
        return Profile(min(1.0, share / node.global_width))

    @cached_property
    def _levels(self) -> list[tuple[float, Fraction]]:
        """(ratio, share) in the order of the mix."""
        return parse_mix(expand_letters(self.mix), parse_ratio)


def draw(chances: Sequence[float], node: Node) -> int:
    """The number of a level in this round, by chances in proportion."""
    return int(torch.multinomial(torch.tensor(chances), 1, generator=node.stream("levels")))


def expand_letters(text: str) -> str:
    """The papers' letters as ratios: a1-e9 is 1:1,1/16:9; 0.75^k is the mix of FedConv's code."""
    if text.strip() == "0.75^k":
        return "0.75^0:2,0.75^1:4,0.75^2:4"
    if not LETTERS.fullmatch(text.strip().lower()):
        return text
    return ",".join(f"1/{2 ** (ord(part[0]) - ord('a'))}:{part[1:]}" for part in text.strip().lower().split("-"))
