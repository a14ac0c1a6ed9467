"""Capacity that changes from round to round: battery and load read from a table (FedConv's open question on changing resources)."""

from __future__ import annotations

import csv
from pathlib import Path

from pydantic import PrivateAttr, model_validator

from hetfl import Field, Node, Plugin, Profile, hookimpl
from hetfl.profiling.capacity import WidthGrid, find_largest_width, parse_grid

Row = dict[str, float]

FACTS = ("width", "battery", "load")


class Trace(Plugin):
    """`file` is a CSV with the columns round, client and any of width, battery, load, all in [0, 1]; a row holds until the next.

    A client's capacity is width * battery * (1 - load), taken down to the next width of the grid, at least the smallest.
    """

    file: Path = Field(Path("trace.csv"), description="CSV: round, client, width, battery, load")
    grid: WidthGrid = Field("1,0.75,0.5,0.25", description="widths to choose from")
    _rows: dict[int, dict[int, Row]] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _read_file(self) -> Trace:
        self._rows = read_trace(self.file)
        return self

    @hookimpl
    def profile(self, node: Node) -> Profile:
        rows = self._rows.get(node.client, {})
        row = rows.get(max((r for r in rows if r <= node.round), default=0), {})
        grid, capacity = parse_grid(self.grid), row.get("width", 1.0) * row.get("battery", 1.0) * (1 - row.get("load", 0.0))
        reason = ", ".join(f"{name} {value:g}" for name, value in row.items())
        return find_largest_width(grid, lambda ratio: reason if ratio > max(capacity, min(grid)) + 1e-9 else "")


def read_trace(path: Path) -> dict[int, dict[int, Row]]:
    """The rows of a trace, {client: {round: facts}}, where facts are any of width, battery, load in [0, 1].

    Raises ValueError for a file that cannot be read so.
    """
    try:
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"'{path}' cannot be read: {error}") from error
    rows: dict[int, dict[int, Row]] = {}
    for number, line in enumerate(lines, 2):
        try:
            client, round = int(line["client"]), int(line["round"])
            facts = {name: float(line[name]) for name in FACTS if line.get(name)}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"'{path}', line {number}: needs whole numbers round and client, and numbers {', '.join(FACTS)}"
            ) from error
        if not all(0 <= value <= 1 for value in facts.values()):
            raise ValueError(f"'{path}', line {number}: {', '.join(FACTS)} lie in [0, 1]")
        rows.setdefault(client, {})[round] = facts
    if not rows:
        raise ValueError(f"'{path}' holds no row")
    return rows
