"""Who is told of a run's progress, and the rows of its tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hetfl.profiling.cost import Cost
from hetfl.rounds.messages import Assignment, Row


class Callback(Protocol):
    """Who looks on while a run goes: the command line's display, or a test."""

    def phase(self, round: int, name: str) -> None: ...
    def done(self, row: Row) -> None: ...
    def note(self, text: str) -> None: ...
    def alarm(self, text: str) -> None: ...


class NoCallback:
    """Nobody looks on."""

    def phase(self, round: int, name: str) -> None: ...
    def done(self, row: Row) -> None: ...
    def note(self, text: str) -> None: ...
    def alarm(self, text: str) -> None: ...


def device_costs(cost: Cost, sent: Assignment) -> Row:
    """What a device spends on its submodel: parameters that exist, and dense compute and memory even where entries are masked."""
    masked = sum(int((~mask).sum()) for mask in sent.plan.masks.values())
    return {"parameters": cost.parameters - masked, "MACs": cost.macs, "memory": cost.memory}


def add_mean_and_decile(row: Row, name: str, values: Sequence[float]) -> None:
    """Mean and worst decile over clients, under the metric's name."""
    if values:
        ordered = sorted(values)
        row[name] = sum(values) / len(values)
        row[f"{name} p10"] = ordered[int(0.1 * (len(ordered) - 1))]
