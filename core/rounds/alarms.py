"""What a reader of a run must not overlook, said as soon as it is seen, once until it goes away."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from hetfl.rounds.rows import CHANGE, CLIENT, Row

PATIENCE = 3  # evaluated rounds before chance level is worth a word

CHANCE, EXPLODED, SKEWED = 1.1, 3.0, 10.0  # times chance, the lowest loss so far, the median change of a client


class Watch:
    """Looks at each round once. It keeps the number of evaluations, the least loss, and the alarms of the round before."""

    def __init__(self, chance: float | None, blind: float) -> None:
        """`chance` (None: unknown) and `blind`: score and loss of who has not looked at the inputs."""
        self._chance, self._blind, self._evaluated, self._least, self._before = chance, blind, 0, math.inf, frozenset[str]()

    def look(self, row: Row, people: Sequence[Row]) -> list[str]:
        """The alarms of a round that the one before did not have; `people` are the rows of its clients."""
        found = dict([*self._accuracy_alarms(row), *self._loss_alarms(row), *client_alarms(people)])
        before, self._before = self._before, frozenset(found)
        return [text for kind, text in found.items() if kind not in before]

    def _accuracy_alarms(self, row: Row) -> Iterator[tuple[str, str]]:
        if "global@test" not in row:
            return
        self._evaluated += 1
        if self._chance is not None and self._evaluated >= PATIENCE and row["global@test"] <= CHANCE * self._chance:
            yield "chance", f"global accuracy {row['global@test']:.1%} is at the level of chance ({self._chance:.1%})"

    def _loss_alarms(self, row: Row) -> Iterator[tuple[str, str]]:
        if "global@test loss" not in row:
            return
        now = row["global@test loss"]
        self._least = min(self._least, now)
        if not math.isfinite(now) or (now > EXPLODED * self._least and now > 2 * self._blind):
            yield "loss", f"the global model's loss has exploded: {now:.3g}, {self._least:.3g} at best"


def client_alarms(people: Sequence[Row]) -> Iterator[tuple[str, str]]:
    lost = [row[CLIENT] for row in people if not math.isfinite(row.get("loss", 0.0))]
    if lost:
        yield "client loss", f"the training loss of client {lost[0]} is no number"
    changes = {row[CLIENT]: row[CHANGE] for row in people if CHANGE in row}
    middle = statistics.median(changes.values()) if len(changes) > PATIENCE else 0.0
    if middle and max(changes.values()) > SKEWED * middle:
        client = max(changes, key=lambda c: changes[c])
        times = changes[client] / middle
        yield "skew", f"client {client} changed its submodel's weights {times:.0f} times as much as the clients in the middle"
