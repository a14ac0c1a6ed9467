"""The two ways a command ends badly: the user asked for something that is not there, or the run itself failed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UsageError(Exception):
    """What was asked for cannot be done as asked; the command ends with exit code 2."""


class NotApplicable(UsageError):  # noqa: N818 (no error: an answer)
    """Two parts that are each in order cannot work together, or not with these data."""


class RunError(Exception):
    """The run could not go on; the command ends with exit code 1."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, or nothing when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The sentence for a name that is not one of `known`."""
    known = sorted(known)
    return UsageError(f"unknown {what} '{name}'{nearest(name, known)} (known: {', '.join(known) or 'none'})")
