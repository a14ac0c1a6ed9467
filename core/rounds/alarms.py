"""What a reader of a run must not overlook, said as soon as it is seen, once until it goes away."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence

from hetfl.rounds.rows import CHANGE, CLIENT, ROUND, Row

PATIENCE = 3  # evaluated rounds before chance level is worth a word

CHANCE, EXPLODED, SKEWED = 1.1, 3.0, 10.0  # times chance, the lowest loss so far, the median change of a client


def find_alarms(rows: Sequence[Row], people: Sequence[Row], classes: int) -> list[str]:
    """The alarms of the last of `rows` that the one before did not have; `people` are the rows of clients."""
    before = alarms_of(rows[:-1], people, 1 / classes) if len(rows) > 1 else {}
    return [text for kind, text in alarms_of(rows, people, 1 / classes).items() if kind not in before]


def alarms_of(rows: Sequence[Row], people: Sequence[Row], chance: float) -> dict[str, str]:
    """The alarms after the last of `rows`, by their kind."""
    recent = itertools.takewhile(lambda row: row[ROUND] >= rows[-1][ROUND], reversed(people))
    ours = [row for row in recent if row[ROUND] == rows[-1][ROUND]]
    return dict([*accuracy_alarms(rows, chance), *loss_alarms(rows, chance), *client_alarms(ours)])


def accuracy_alarms(rows: Sequence[Row], chance: float) -> Iterator[tuple[str, str]]:
    seen = [row["global@test"] for row in rows if "global@test" in row]
    if len(seen) >= PATIENCE and "global@test" in rows[-1] and seen[-1] <= CHANCE * chance:
        yield "chance", f"global accuracy {seen[-1]:.1%} is at the level of chance ({chance:.1%})"


def loss_alarms(rows: Sequence[Row], chance: float) -> Iterator[tuple[str, str]]:
    seen = [row["global@test loss"] for row in rows if "global@test loss" in row]
    if "global@test loss" not in rows[-1]:
        return
    least, now = min(seen), seen[-1]
    if not math.isfinite(now) or (now > EXPLODED * least and now > -2 * math.log(chance)):
        yield "loss", f"the global model's loss has exploded: {now:.3g}, {least:.3g} at best"


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
