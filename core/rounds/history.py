"""What later rounds and the summary need of the rounds so far. It has one size, however many they are: the rows themselves go to
the run folder, and a run that goes on is given them once more, one after the other."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from hetfl.rounds.rows import (
    ALARMS,
    BYTES_DOWN,
    BYTES_UP,
    CHANGE,
    CLIENT,
    CLIENT_SECONDS,
    CLOCK,
    DROPPED,
    EXAMPLES,
    FAULT,
    LEVEL,
    MACS,
    MEMORY,
    PARAMETERS,
    PHASE,
    RESERVED,
    SECONDS,
    TAKEN,
    Row,
)

RECENT = 1000  # client rows that bounds are learned from
LAST = 3  # evaluated rounds that the summary is of
TARGETS = (0.5, 0.7, 0.8, 0.9, 0.95)
COSTS = (PARAMETERS, MACS, MEMORY, BYTES_DOWN, BYTES_UP, SECONDS)


@dataclass(eq=False)
class Mean:
    """A sum, and of how many."""

    total: float = 0
    count: int = 0

    def add(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1


@dataclass(eq=False)
class History:
    """Of the `rounds` so far: the `last` row and the last evaluated ones (`measured`), the last row of each client (`latest`) and
    what bounds are learned from (`recent`), the names of their metrics, sums of columns, means of `costs` by level, the simulated
    seconds at which the global model first `reached` an accuracy; whether clients were `asked` and their replies ever `taken`, and
    the first reasons why not.
    """

    rounds: int = 0
    last: Row = field(default_factory=dict)
    measured: deque[Row] = field(default_factory=lambda: deque(maxlen=LAST))
    latest: dict[int, Row] = field(default_factory=dict)
    recent: deque[Row] = field(default_factory=lambda: deque(maxlen=RECENT))
    metrics: set[str] = field(default_factory=set)
    sums: Counter[str] = field(default_factory=Counter)
    costs: dict[str, dict[str, Mean]] = field(default_factory=dict)
    reached: dict[str, float] = field(default_factory=dict)
    asked: bool = False
    taken: bool = False
    replies: int = 0
    faults: int = 0
    first_alarm: str = ""
    first_fault: str = ""

    def add(self, row: Row, people: Sequence[Row]) -> None:
        """A round has ended: its row, and those of its clients."""
        self.rounds, self.last = self.rounds + 1, row
        if "global@test" in row:
            self.measured.append(row)
        if CLOCK in row:
            for target in TARGETS:
                if row.get("global@test", 0.0) >= target:
                    self.reached.setdefault(f"{target:g}", row[CLOCK])
        for name in row:
            if name.startswith(PHASE) or name in (CLIENT_SECONDS, BYTES_DOWN, BYTES_UP, DROPPED):
                self.sums[name] += row[name]
        self.asked, self.taken = self.asked or TAKEN in row, self.taken or bool(row.get(TAKEN))
        self.first_alarm = self.first_alarm or row.get(ALARMS, "")
        for line in people:
            self._add_client(line)

    def _add_client(self, line: Row) -> None:
        self.latest[line[CLIENT]] = line
        self.recent.append({name: line[name] for name in (CHANGE, EXAMPLES, FAULT) if name in line})
        self.metrics |= line.keys() - RESERVED
        self.replies += 1
        if FAULT in line:
            self.faults += 1
            self.first_fault = self.first_fault or f"client {line[CLIENT]}: {line[FAULT]}"
        elif DROPPED not in line:
            costs = self.costs.setdefault(line[LEVEL], {name: Mean() for name in COSTS})
            for name in COSTS:
                if name in line:
                    costs[name].add(line[name])
