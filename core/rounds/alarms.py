"""What a reader of a run must not overlook, said as soon as it is seen, once until it goes away."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

PATIENCE = 3  # evaluated rounds before chance level is worth a word

CHANCE, EXPLODED, SKEWED = 1.1, 3.0, 10.0  # times chance, the lowest loss so far, the median change of a client


class Alarms:
    """Looks at each finished round of a run with `classes` classes."""

    def __init__(self, classes: int) -> None:
        self._chance = 1 / classes

    def look(self, rows: Sequence[Row], people: Sequence[Row]) -> list[str]:
        """The alarms of the last of `rows` that the one before did not have; `people` are the rows of clients."""
        before = self._all(rows[:-1], people) if len(rows) > 1 else {}
        return [text for kind, text in self._all(rows, people).items() if kind not in before]

    def _all(self, rows: Sequence[Row], people: Sequence[Row]) -> dict[str, str]:
        """The alarms after the last of `rows`, by their kind."""
        recent = itertools.takewhile(lambda row: row["round"] >= rows[-1]["round"], reversed(people))
        ours = [row for row in recent if row["round"] == rows[-1]["round"]]
        return dict([*self._accuracy(rows), *self._loss(rows), *self._clients(ours)])

    def _accuracy(self, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
        seen = [row["global@test"] for row in rows if "global@test" in row]
        if len(seen) >= PATIENCE and "global@test" in rows[-1] and seen[-1] <= CHANCE * self._chance:
            yield "chance", f"global accuracy {seen[-1]:.1%} is at the level of chance ({self._chance:.1%})"

    def _loss(self, rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
        seen = [row["global@test loss"] for row in rows if "global@test loss" in row]
        if "global@test loss" not in rows[-1]:
            return
        least, now = min(seen), seen[-1]
        if not math.isfinite(now) or (now > EXPLODED * least and now > -2 * math.log(self._chance)):
            yield "loss", f"the global model's loss has exploded: {now:.3g}, {least:.3g} at best"

    def _clients(self, people: Sequence[Row]) -> Iterator[tuple[str, str]]:
        lost = [row["client"] for row in people if not math.isfinite(row.get("loss", 0.0))]
        if lost:
            yield "client loss", f"the training loss of client {lost[0]} is no number"
        changes = {row["client"]: row["change"] for row in people if "change" in row}
        middle = statistics.median(changes.values()) if len(changes) > PATIENCE else 0.0
        if middle and max(changes.values()) > SKEWED * middle:
            client = max(changes, key=lambda c: changes[c])
            times = changes[client] / middle
            yield "skew", f"client {client} changed its submodel's weights {times:.0f} times as much as the clients in the middle"
