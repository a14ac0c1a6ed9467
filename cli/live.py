"""What the terminal shows while something runs: the rounds of a run, the leaderboard of a sweep."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from hetfl.cli.console import console, plain_text, say
from hetfl.cli.render import format_bytes, leaderboard_table, percent, table
from hetfl.config import RunOptions
from hetfl.errors import plural

if TYPE_CHECKING:
    from hetfl.runs.cell import Trial, TrialResult

SHOWN = 12  # rounds on the screen

LOOK = 60.0  # seconds between two looks at how far the runs of a sweep are

SILENCE = 10.0  # seconds without a line before round 1, after which one says what is being done

COLUMNS = ("global@test", "loss", "control", "client@own", "down", "up", "seconds")


class RoundDisplay:
    """A table of the rounds that grows while they run; one plain line a round where the output is no terminal."""

    def __init__(self, options: RunOptions, path: Path) -> None:
        self.options, self.path = options, path
        self._rows, self._notes = deque[dict[str, Any]](maxlen=SHOWN), deque[str](maxlen=4)
        self._done, self._seconds = 0, 0.0
        self.started, self._told, self._phase = time.perf_counter(), time.perf_counter(), "starting"
        self._screen = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None

    def __enter__(self) -> RoundDisplay:
        options = self.options
        pair = f"{options.extract} x {options.aggregate or 'its natural aggregation'} on {options.dataset}"
        say(f"{pair}, {plural(options.clients, 'client')}, {plural(options.rounds, 'round')}, seed {options.seed} -> {self.path}")
        if self._screen:
            self._screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._screen:
            self._phase = ""
            self._refresh()
            self._screen.stop()

    def phase(self, round: int, name: str) -> None:
        self._phase = f"round {round}: {name}" if round else name
        self._refresh()
        if not self._screen and not round and time.perf_counter() - self._told > SILENCE:
            self._tell(f"{name} …")

    def fact(self, text: str) -> None:
        self._tell(text)

    def _tell(self, text: str) -> None:
        """One line, above the table where there is one."""
        say(text)
        self._told = time.perf_counter()

    def note(self, text: str) -> None:
        self._remark(f"note: {text}")

    def alarm(self, text: str) -> None:
        self._remark(f"ALARM: {text}")

    def _remark(self, text: str) -> None:
        self._notes.append(text)
        self._refresh()
        if not self._screen:
            say(text)

    def done(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        self._done, self._seconds = self._done + 1, self._seconds + row["seconds"]
        self._refresh()
        if not self._screen:
            say(round_line(row, self.options.rounds))

    def _refresh(self) -> None:
        if self._screen:
            notes = (plain_text(n, "bold red" if n.startswith("ALARM") else "yellow") for n in self._notes)
            self._screen.update(Group(self._table(), plain_text(self._status()), *notes))
            self._screen.refresh()

    def _status(self) -> str:
        if not self._phase:
            return ""
        left = ""
        if self._done:
            left = f", about {self._seconds / self._done * (self.options.rounds - self._done):.0f} s left"
        return f"{self._phase} ({time.perf_counter() - self.started:.0f} s{left})"

    def _table(self) -> Table:
        rows = [(str(row["round"]), *round_cells(row)) for row in self._rows]
        return table(("round", *COLUMNS), rows, numbers=0)


def round_cells(row: dict[str, Any]) -> list[str]:
    """A round's values under COLUMNS."""
    loss = f"{row['global@test loss']:.3f}" if "global@test loss" in row else ""
    accuracy, control, own = (percent(row.get(name)) for name in ("global@test", "control@test", "client@own"))
    return [accuracy, loss, control, own, format_bytes(row["bytes down"]), format_bytes(row["bytes up"]), f"{row['seconds']:.2f}"]


def round_line(row: dict[str, Any], rounds: int) -> str:
    """A round in one line."""
    shown = " ".join(f"{name} {value}" for name, value in zip(COLUMNS, round_cells(row), strict=True) if value)
    return f"round {row['round']}/{rounds} {shown}"


Describe = Callable[["TrialResult"], str]  # a run's value, as its line says it


class SweepDisplay:
    """The leaderboard of a sweep by a metric while it runs; one plain line a trial where the output is no terminal, or where
    `value` is what says a line's value.

    Every minute it says how far the runs in the folder `out` are.
    """

    def __init__(self, trials: Sequence[Trial], value: str | Describe, out: Path) -> None:
        self._trials, self._metric, self._started = trials, value if isinstance(value, str) else "", time.perf_counter()
        self._describe: Describe = value if callable(value) else lambda result: percent(result.row.get(self._metric))
        self._out, self._ended = out, threading.Event()
        self._screen = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal and self._metric else None

    def __enter__(self) -> SweepDisplay:
        if self._screen:
            self._screen.start()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._screen:
            self._screen.stop()

    def _watch(self) -> None:
        """Says how far runs are, as long as they go on."""
        said = dict[str, int]()
        while not self._ended.wait(LOOK):
            for trial in self._trials:
                cell = self._out / "cells" / trial.name
                if (rounds := count_rounds(cell)) and rounds != said.get(trial.name):
                    say(f"{describe_trial(trial)}: round {rounds} of {trial.options.rounds} has ended")
                    said[trial.name] = rounds

    def show(self, results: Sequence[TrialResult]) -> None:
        """Shows what is known by now; the last of `results` is the new one."""
        done, new = len(results), results[-1]
        if self._screen:
            from hetfl.runs.leaderboard import sort_results

            passed = time.perf_counter() - self._started
            status = f"{done} of {len(self._trials)} trials, {sum(r.cached for r in results)} of them from before ({passed:.0f} s)"
            self._screen.update(Group(leaderboard_table(sort_results(results, self._trials), self._metric), Text(status)))
            self._screen.refresh()
            return
        value = self._describe(new) if new.status == "ok" else f"{new.status}: {new.row['why']}"
        say(f"[{done}/{len(self._trials)}] {describe_trial(new.trial)}: {value}")


def describe_trial(trial: Trial) -> str:
    """What tells a trial from the others of its sweep."""
    at = ", ".join(f"{name} {value}" for name, value in trial.point)
    return f"{trial.extract} x {trial.aggregate} {at} seed {trial.seed}"


def count_rounds(cell: Path) -> int:
    """The rounds that have ended of a run that is not at its end; 0 where there is none."""
    if (cell / "summary.json").exists() or (cell / "refused.json").exists():
        return 0
    try:
        return max(0, (cell / "metrics.csv").read_bytes().count(b"\n") - 1)
    except OSError:
        return 0
