"""One run of a matrix: its options, and what came of it."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hetfl import registry
from hetfl.config import RunOptions

IDLE = {"out", "overwrite", "workers"}  # options that change no result


@dataclass(frozen=True)
class Trial:
    """One run: what the matrix varies in it beside pair and seed (`point`), and the whole of its options."""

    point: tuple[tuple[str, Any], ...]
    options: RunOptions

    @property
    def extract(self) -> str:
        return self.options.extract

    @property
    def aggregate(self) -> str:
        return self.options.aggregate or natural(self.extract)

    @property
    def seed(self) -> int:
        return self.options.seed

    @property
    def key(self) -> str:
        """A hash of all that its result depends on."""
        values = self.options.model_dump(mode="json", exclude=IDLE)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        return f"{self.extract}-{self.aggregate}-{self.key}"


Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class TrialResult:
    """What became of a cell: "ok", "not applicable" or "failed", its row, and why where it is not ok."""

    cell: Trial
    status: str
    row: Row = field(default_factory=dict)
    cached: bool = False


def natural(extract: str) -> str:
    return registry.find("extract", extract).aggregate or "overlap"


def row(cell: Trial, found: Mapping[str, Any]) -> Row:
    """A cell's line of matrix.csv; costs are means over the levels' clients."""
    base: Row = {"extract": cell.extract, "aggregate": cell.aggregate, **dict(cell.point), "seed": cell.seed}
    if "why" in found:
        return base | {"status": found["status"], "why": found["why"], "config": cell.key}
    accuracies = {name: values["last three"] for name, values in found["accuracy"].items()}
    deciles = {f"{name} p10": values["p10"] for name, values in found["accuracy"].items() if "p10" in values}
    levels = found["levels"]
    costs = {n: statistics.fmean(level[n] for level in levels) for n in ("parameters", "MACs", "memory") if levels}
    totals = {name: found[name] for name in ("bytes down", "bytes up", "client seconds", "seconds")}
    return base | {"status": "ok", **accuracies, **deciles, **costs, **totals, "config": cell.key}
