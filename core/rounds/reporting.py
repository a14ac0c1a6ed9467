"""Who is told of a run's progress."""

from __future__ import annotations

from typing import Protocol

from hetfl.rounds.rows import Row


class Callback(Protocol):
    """Told of a run's progress: the command line's display, the run folder, a test."""

    def phase(self, round: int, name: str) -> None:
        """A phase of round `round` begins (round 0: before the first)."""

    def done(self, row: Row) -> None:
        """A round has ended; `row` is its line of metrics.csv."""

    def fact(self, text: str) -> None:
        """A line about the run as it is: what is trained, on what, by whom."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def alarm(self, text: str) -> None:
        """Something that nobody may overlook."""


class NoCallback:
    """Nobody is told."""

    def phase(self, round: int, name: str) -> None: ...
    def done(self, row: Row) -> None: ...
    def fact(self, text: str) -> None: ...
    def note(self, text: str) -> None: ...
    def alarm(self, text: str) -> None: ...
