"""The rows of metrics.csv and clients.csv, and the names of their columns."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hetfl.data.kinds import DETAILS

Row = dict[str, Any]  # a line of a table: column -> value

ROUND, CLIENT, LEVEL, BOTTLENECK = "round", "client", "level", "bottleneck"
BYTES_DOWN, BYTES_UP = "bytes down", "bytes up"
EXAMPLES, CHANGE, FAULT, TRACEBACK = "examples", "change", "fault", "traceback"
PARAMETERS, MACS, MEMORY = "parameters", "MACs", "memory"
OWN_ACCURACY, OWN_LOSS, SECONDS = "own accuracy", "own loss", "seconds"  # metrics of a reply
CLIENTS, LEFT_OUT, CLIENT_SECONDS, ALARMS = "clients", "left out", "client seconds", "alarms"
TAKEN = "taken"
STATISTICS_BYTES = "statistics bytes"  # of both ways' bytes, those of --norm-policy static
# under --fleet
SIMULATED, JOULES, CLOCK, JOULES_SO_FAR = "simulated seconds", "joules", "simulated seconds so far", "joules so far"
DROPPED, DEVICE = "dropped", "device"
STALENESS, UNDER_WAY = "staleness", "under way"  # of --schedule semi and fedbuff
SERVER_STEPS, STEPS_SAVED, PHASE = "server steps", "server steps saved", "seconds "  # PHASE + the name of a phase
CLIENTS_MODELS = ("client", "personal", "control", "pretrained")  # how accuracies begin that are not of the global model
MEAN_LEVEL, WORST_LEVEL = "mean level@test", "worst level@test"
RESERVED = {
    ROUND, CLIENT, LEVEL, BOTTLENECK, BYTES_DOWN, BYTES_UP, EXAMPLES, FAULT, TRACEBACK, PARAMETERS, MACS, MEMORY, CHANGE,
    SIMULATED, JOULES, DROPPED, DEVICE, STALENESS,
}  # fmt: skip

MOST_FACTS = 64  # of an aggregation, in a round
SCORE = re.compile("personal-[a-z]+@own")  # a fact: a score of what clients keep; of levels, numbers, the run has them


def find_facts_fault(facts: Any) -> str | None:
    """Why an aggregation's facts are no columns of metrics.csv beside the run's own, or None."""
    if not isinstance(facts, Mapping) or len(facts) > MOST_FACTS:
        return f"answered facts that are not at most {MOST_FACTS} numbers by name"
    own = RoundRow(0, taken=False, simulated=(0, 0, 0, 0), under_way=0, alarms=[""]).columns()
    for name, value in facts.items():
        if not isinstance(name, str) or not isinstance(value, int | float):
            return f"answered a fact {name!r:.80} of type {type(value).__name__}, which is no number under a name"
        if name in own or name.startswith(PHASE) or ("@" in name and not SCORE.fullmatch(name)):
            return f"answered a fact under the name '{name:.80}', which is a column of the run's own"
    return None


def is_of_global(name: str) -> bool:
    """Whether an accuracy is one of the global model, or of a part of it: global@test, level-0.5@test, submodel@own …"""
    return name.partition("@")[0].partition("-")[0] not in CLIENTS_MODELS


def is_detail(name: str) -> bool:
    """Whether a column says more of a score: its loss, its worst decile …"""
    return name.endswith(tuple(f" {detail}" for detail in DETAILS))


@dataclass(eq=False)
class ClientRow:
    """One client in one round: a line of clients.csv. `metrics` are the client's own; `costs` those of its submodel."""

    round: int
    client: int
    level: str = ""
    bottleneck: str = ""
    bytes_down: int = 0
    bytes_up: int = 0
    examples: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    change: float | None = None
    fault: str = ""
    traceback: str = ""
    costs: dict[str, int] = field(default_factory=dict)
    dropped: str = ""  # why it was not merged, though nothing is wrong with it
    device: str = ""
    simulated: float | None = None
    joules: float | None = None
    staleness: int | None = None  # merges between the model that it was sent and that which it is merged into

    def columns(self) -> Row:
        """The line; what is not known has no column."""
        some = {LEVEL: self.level, BOTTLENECK: self.bottleneck}
        time = {SIMULATED: self.simulated, JOULES: self.joules, DEVICE: self.device or None, DROPPED: self.dropped or None}
        time[STALENESS] = self.staleness
        more = {**time, CHANGE: self.change, FAULT: self.fault or None, TRACEBACK: self.traceback or None}
        return {
            ROUND: self.round, CLIENT: self.client, **{k: v for k, v in some.items() if v},
            BYTES_DOWN: self.bytes_down, BYTES_UP: self.bytes_up,
            **({} if self.examples is None else {EXAMPLES: self.examples}), **self.metrics,
            **{k: v for k, v in more.items() if v is not None}, **self.costs,
        }  # fmt: skip


@dataclass(eq=False)
class RoundRow:
    """One round: a line of metrics.csv. `results` are accuracies and losses by (model, split), `facts` the aggregation's,
    `server_steps` those on the server's data by their batch size."""

    round: int
    taken: bool | None = None  # whether the clients' replies became the next global model; None: nobody was asked
    facts: dict[str, float] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)
    clients: dict[int, ClientRow] = field(default_factory=dict)
    alarms: list[str] = field(default_factory=list)
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    server_steps: Counter[int] = field(default_factory=Counter)
    steps_saved: int = 0
    simulated: tuple[float, float, float, float] | None = None  # seconds and joules of the round, and of the run so far
    under_way: int | None = None  # updates that wait for a later merge

    def add_mean_and_decile(self, name: str, values: Sequence[float]) -> None:
        """The mean and the worst decile over clients, under the metric's name."""
        if values:
            ordered = sorted(values)
            self.results[name] = sum(values) / len(values)
            self.results[f"{name} p10"] = ordered[int(0.1 * (len(ordered) - 1))]

    def add_levels(self) -> None:
        """The mean over the levels' accuracies on the test split, and the worst of them."""
        levels = [value for name, value in self.results.items() if name.startswith("level-") and name.endswith("@test")]
        if levels:
            self.results |= {MEAN_LEVEL: sum(levels) / len(levels), WORST_LEVEL: min(levels)}

    def columns(self) -> Row:
        """The line."""
        people = self.clients.values()
        time = dict(zip((SIMULATED, JOULES, CLOCK, JOULES_SO_FAR), self.simulated or (), strict=False))
        time |= {DROPPED: sum(bool(c.dropped) for c in people)} if self.simulated else {}
        late = [c.staleness for c in people if c.staleness is not None]
        time |= {} if self.under_way is None else {STALENESS: sum(late) / max(len(late), 1), UNDER_WAY: self.under_way}
        return {
            ROUND: self.round, **self.facts, **self.results,
            BYTES_DOWN: sum(c.bytes_down for c in people), BYTES_UP: sum(c.bytes_up for c in people),
            **({} if self.taken is None else {TAKEN: int(self.taken)}),
            CLIENTS: len(people), LEFT_OUT: sum(bool(c.fault) for c in people),
            **time, CLIENT_SECONDS: sum(c.metrics.get(SECONDS, 0.0) for c in people), SECONDS: self.seconds,
            SERVER_STEPS: self.server_steps.total(), STEPS_SAVED: self.steps_saved,
            **{f"{PHASE}{name}": value for name, value in self.phases.items()},
            **({ALARMS: "; ".join(self.alarms)} if self.alarms else {}),
        }  # fmt: skip
