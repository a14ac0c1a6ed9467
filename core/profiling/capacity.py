"""From a device's limits to the largest width that fits them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Annotated, TypeVar

from pydantic import AfterValidator

from hetfl.profiling.node import Profile

Item = TypeVar("Item")

Choice = Callable[[Sequence[Item]], Item]

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}


def find_largest_width(grid: Sequence[float], limit: Callable[[float], str]) -> Profile:
    """The largest width of `grid` that exceeds no limit; its bottleneck is the limit that the next larger width exceeds.

    `limit(ratio)` names the limit that the width exceeds, or nothing. Raises ValueError where even the smallest width exceeds one.
    """
    bottleneck = ""
    for ratio in sorted(grid, reverse=True):
        exceeded = limit(ratio)
        if not exceeded:
            return Profile(ratio, bottleneck)
        bottleneck = exceeded
    raise ValueError(f"even width {min(grid):g} is too much: {bottleneck}")


def parse_grid(text: str) -> list[float]:
    """The widths of a grid such as 1,0.75,0.5. Raises ValueError for what is no width in (0, 1]."""
    return [parse_ratio(part) for part in text.split(",")]


def check_grid(text: str) -> str:
    """`text`, where `parse_grid` can read it. Raises ValueError."""
    parse_grid(text)
    return text


WidthGrid = Annotated[str, AfterValidator(check_grid)]  # the type of a plugin's option that is a grid


def parse_ratio(text: str) -> float:
    """A width in (0, 1], as a number, a fraction such as 1/4, or a power such as 0.75^2 or 0.2^1/2."""
    base, _, power = text.strip().partition("^")
    try:
        value = math.pow(Fraction(base), Fraction(power or 1))
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"'{text}' is no ratio, such as 0.5, 1/4 or 0.75^2") from error
    if not 0 < value <= 1:
        raise ValueError(f"ratio {text} is outside (0, 1]; a ratio is the width that remains")
    return value


def parse_quantity(text: str) -> float:
    """A number with an optional unit: 256MB, 1.5GB, 20M, 3e9. Raises ValueError."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[+-]?\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if not found or float(found[1]) <= 0:
        raise ValueError(f"'{text}' is no amount, such as 256MB, 20M or 3e9")
    return float(found[1]) * UNITS[found[2]]


def parse_mix(text: str, value: Callable[[str], Item]) -> list[tuple[Item, Fraction]]:
    """(value, share) of each part of `value:share, …`; a part without a share counts 1. Raises ValueError."""
    found = []
    for part in text.split(","):
        name, _, share = part.strip().partition(":")
        try:
            weight = Fraction(share or "1")
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"'{part}' is not value:share, such as 0.5:8") from error
        if weight <= 0:
            raise ValueError(f"share {share} of {name} must be above 0")
        found.append((value(name), weight))
    return found


def assign_shares(parts: Sequence[tuple[Item, Fraction]], clients: int, held: Item | None = None) -> list[Item]:
    """Every client's value: floor(clients * share / sum) clients get each in order, the rest the last (spec heterofl 2.7).

    With 1:1,0.5:2 and 10 clients, 3 have 1 and 7 have 0.5. Where there are fewer clients than the shares' sum, flooring would give
    all of them the last value; then client i of n gets the value in whose part of the running sum (i + 1/2) / n falls: with
    1:2,0.75:3,0.5:3,0.25:2 and 4 clients, 1, 0.75, 0.5 and 0.25. If nobody has the value `held`, one client of the commonest other
    value gets it.
    """
    total = sum((share for _, share in parts), Fraction())
    if clients < total:
        ends = [clients * sum((s for _, s in parts[: i + 1]), Fraction()) / total for i in range(len(parts))]
        numbers = [next(i for i, end in enumerate(ends) if client + Fraction(1, 2) < end) for client in range(clients)]
    else:
        numbers = [i for i, (_, share) in enumerate(parts) for _ in range(int(clients * share / total))]
        numbers += [len(parts) - 1] * (clients - len(numbers))
    if held is not None and all(parts[i][0] != held for i in numbers):
        numbers.remove(max(numbers, key=numbers.count))
        numbers = sorted([next(i for i, (value, _) in enumerate(parts) if value == held), *numbers])
    return [parts[i][0] for i in numbers]


@lru_cache
def assign_mix(text: str, value: Callable[[str], Item], clients: int, held: Choice[Item] | None = None) -> tuple[Item, ...]:
    """Every client's value under the mix `text`, the one that `held` chooses of all (such as `max`) with one client at least;
    cached, for every client asks for it."""
    parts = parse_mix(text, value)
    return tuple(assign_shares(parts, clients, held([v for v, _ in parts]) if held else None))
