"""Who looks on while `hetfl.run` goes: a program's own callback, and a line of progress in a terminal or a notebook."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from hetfl.errors import UsageError, nearest
from hetfl.rounds.reporting import Callback

METHODS = (
    "on_run_start", "on_round_start", "on_phase", "on_round_end", "on_fact", "on_note", "on_alarm", "on_run_end",
)  # fmt: skip

BAR = 24  # characters


class Observers:
    """A Callback of the core that calls the methods that each of `observers` has of METHODS.

    Rounds that had ended before a run went on are not told again.
    """

    def __init__(self, observers: Sequence[object]) -> None:
        for one in observers:
            if not any(callable(getattr(one, name, None)) for name in METHODS):
                mine = next((name for name in dir(one) if name.startswith("on_")), "")
                raise UsageError(
                    f"the callback {one!r} has no method that would be called{nearest(mine, METHODS)} ({', '.join(METHODS)})"
                )
        self._observers, self._round = list(observers), 0

    def tell(self, method: str, *said: Any) -> None:
        """Calls `method` of those who have it."""
        for one in self._observers:
            if callable(called := getattr(one, method, None)):
                called(*said)

    def phase(self, round: int, name: str) -> None:
        if round > self._round:
            self._round = round
            self.tell("on_round_start", round)
        self.tell("on_phase", round, name)

    def done(self, row: Mapping[str, Any]) -> None:
        if row["round"] == self._round:
            self.tell("on_round_end", row)

    def fact(self, text: str) -> None:
        self.tell("on_fact", text)

    def note(self, text: str) -> None:
        self.tell("on_note", text)

    def alarm(self, text: str) -> None:
        self.tell("on_alarm", text)


class Tee:
    """A Callback that tells several."""

    def __init__(self, *callbacks: Callback) -> None:
        self._callbacks = callbacks

    def phase(self, round: int, name: str) -> None:
        for one in self._callbacks:
            one.phase(round, name)

    def done(self, row: dict[str, Any]) -> None:
        for one in self._callbacks:
            one.done(row)

    def fact(self, text: str) -> None:
        for one in self._callbacks:
            one.fact(text)

    def note(self, text: str) -> None:
        for one in self._callbacks:
            one.note(text)

    def alarm(self, text: str) -> None:
        for one in self._callbacks:
            one.alarm(text)


class Progress:
    """One line: a bar of `total` steps, what is being done, and the last accuracy; it stays when the run has ended."""

    def __init__(self, title: str, total: int, show: Any) -> None:
        self._title, self._total, self._show = title, total, show
        self._step, self._status, self._started = 0, "starting", time.perf_counter()
        self._show(self.line())

    def line(self) -> str:
        """The line as it is now."""
        full = round(BAR * self._step / max(1, self._total))
        seconds = time.perf_counter() - self._started
        return f"{self._title}  {'━' * full}{'─' * (BAR - full)} {self._step}/{self._total}  {self._status}  {seconds:.0f} s"

    def step(self, number: int, status: str) -> None:
        """`number` steps are done."""
        self._step, self._status = number, status
        self._show(self.line())

    def on_phase(self, round: int, name: str) -> None:
        if not round:
            self._status = name
        self._show(self.line())

    def on_round_end(self, row: Mapping[str, Any]) -> None:
        accuracy = row.get("global@test")
        self.step(row["round"], self._status if accuracy is None else f"global@test {accuracy:.1%}")


@contextmanager
def progress_line(wanted: bool | str, title: str, total: int) -> Iterator[list[Progress]]:
    """A Progress while it lasts, or none: by default where there is a terminal or a notebook to show it."""
    if wanted not in (True, False, "auto"):
        raise UsageError(f"progress is True, False or 'auto', not {wanted!r}")
    console = Console(highlight=False)
    if not wanted or (wanted == "auto" and not (console.is_terminal or console.is_jupyter)):
        yield []
    elif console.is_jupyter:
        yield [Progress(title, total, notebook_line())]
    elif console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield [Progress(title, total, lambda text: live.update(Text(text, overflow="ellipsis", no_wrap=True), refresh=True))]
    else:
        line = Progress(title, total, lambda text: None)
        yield [line]
        console.print(line.line(), soft_wrap=True, markup=False)


def notebook_line() -> Any:
    """Shows a text in a notebook's cell in place of the one before; rich's own live display needs ipywidgets for it."""
    handle = importlib.import_module("IPython.display").display({"text/plain": ""}, raw=True, display_id=True)
    return lambda text: handle.update({"text/plain": text}, raw=True)
