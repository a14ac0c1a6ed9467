"""The checks of all roles together, and how one is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from hetfl.registry import ROLES
from hetfl.testing.subject import Subject


class Tier(IntEnum):
    """What a plugin has shown in small runs. Whether a published table comes out is no tier: see `hfl reproduce`."""

    NONE = 0
    BRONZE = 1
    SILVER = 2
    GOLD = 3


@dataclass(frozen=True)
class Check:
    """One check: `run` raises AssertionError with a sentence, or NotChecked with a reason; it may answer what it looked at."""

    name: str
    tier: Tier
    roles: tuple[str, ...]
    about: str
    run: Callable[[Subject], str | None]


CHECKS: dict[str, Check] = {}


def check(tier: Tier, *roles: str) -> Callable[[Callable[[Subject], str | None]], Callable[[Subject], str | None]]:
    """Makes a function the check of its name, for plugins of `roles` (all by default); its docstring says what must be so."""

    def add(run: Callable[[Subject], str | None]) -> Callable[[Subject], str | None]:
        about = (run.__doc__ or "").strip().splitlines()[0]
        CHECKS[run.__name__] = Check(run.__name__, tier, roles or ROLES, about, run)
        return run

    return add


def checks_of(role: str) -> list[Check]:
    """The checks for plugins of a role, the lowest tier first."""
    return sorted((c for c in CHECKS.values() if role in c.roles), key=lambda c: c.tier)
