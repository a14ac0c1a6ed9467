"""The two ways a command ends badly: the user asked for something that is not there, or the run itself failed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UsageError(Exception):
    """What was asked for cannot be done as asked; the command ends with exit code 2."""


class NotApplicable(UsageError):  # noqa: N818 (no error: an answer)
    """Two parts that are each in order cannot work together, or not with these data."""


class RunError(Exception):
    """The run could not go on; the command ends with exit code 1."""


FOREIGN = (LookupError, TypeError, ValueError, AttributeError, RecursionError)  # what reading raises of what somebody else wrote


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Raises RunError for what cannot be read within: `what`, a file or a checkpoint, is not as this version of hetfl writes it."""
    try:
        yield
    except FOREIGN as error:
        raise RunError(f"{what} is not what this version of hetfl leaves ({type(error).__name__}: {error})") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name closest to `name`, capitals aside, or nothing when none is close."""
    folded = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    return f"; did you mean '{folded[close[0]]}'?" if close else ""


def plural(count: int, noun: str) -> str:
    """`count` of something in words: "1 round", "3 rounds"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def unknown(what: str, name: str, known: Iterable[str]) -> UsageError:
    """The sentence for a name that is not one of `known`."""
    known = sorted(known)
    return UsageError(f"unknown {what} '{name}'{nearest(name, known)} (known: {', '.join(known) or 'none'})")
