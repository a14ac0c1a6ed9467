"""The state of a run between rounds, and of the round under way."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from hetfl.aggregation.updates import Update
from hetfl.config import RunOptions
from hetfl.data.dataset import Examples
from hetfl.hooks.manager import PluginManager
from hetfl.hooks.server import Server
from hetfl.hooks.values import Coverage, ReceivedReply
from hetfl.models.normalization import STATIC, initial_statistics, running_names
from hetfl.models.state import State, move_state
from hetfl.profiling.meter import Meter
from hetfl.profiling.node import Profile
from hetfl.rounds.alarms import Watch
from hetfl.rounds.clock import Clock, Turn
from hetfl.rounds.evaluator import Evaluator
from hetfl.rounds.history import History
from hetfl.rounds.limits import Limits
from hetfl.rounds.messages import Assignment, Engine
from hetfl.rounds.reporting import Callback
from hetfl.rounds.rows import ClientRow, RoundRow, Row
from hetfl.submodel.plan import Plan

Item = TypeVar("Item")


@dataclass(eq=False)
class Underway:
    """An update that waits for a later merge: what its client changed of the model of `round`, in the tensors `moved`; of others
    the values. It `arrives` at so many simulated seconds of the run; `row` is its line of clients.csv, `more` as in `Coverage`."""

    update: Update
    round: int
    arrives: float
    row: ClientRow
    moved: frozenset[str]
    more: bool


@dataclass(eq=False)
class RunState:
    """A run between two rounds. `clients` is their number, `test` the global test split, `norm_policy` the one in force.

    `control` is the server-only control's model, `initial` the global model before round 1. By client: `extras` and `last_round`
    of its last valid reply (round 0: none), `state_versions` the round that its own state is of. `device` is where submodels lie on
    their way to clients and back, and where they are summed; the server's own tensors are in main memory. `metric_names`: those
    that replies have used so far. `rows` and `client_rows` are those of finished rounds that nobody has put away yet; `unsaid`
    counts notes that are too many to keep.
    """

    server: Server
    plugins: PluginManager
    callback: Callback
    clients: int
    test: Examples
    meter: Meter
    norm_policy: str
    control: State
    initial: State
    device: str = "cpu"
    rows: list[Row] = field(default_factory=list)
    client_rows: list[Row] = field(default_factory=list)
    history: History = field(default_factory=History)
    unsaid: int = 0
    clock: Clock | None = None  # of a run with --fleet
    underway: dict[int, Underway] = field(default_factory=dict)  # by client: what waits for a later merge
    at_work: dict[int, RoundState] = field(default_factory=dict)  # by client: of what round, where merges take what really arrives
    mail: dict[int, Any] = field(default_factory=dict)  # by client: of those at work the answers that have come
    extras: dict[int, State] = field(default_factory=dict)
    last_round: dict[int, int] = field(default_factory=dict)
    state_versions: dict[int, int] = field(default_factory=dict)
    metric_names: set[str] = field(default_factory=set)
    own_statistics: dict[tuple[int, ...], tuple[Plan, State, State]] = field(default_factory=dict)  # of plans, of the last model
    options: RunOptions = field(init=False)
    at_home: frozenset[str] = field(init=False)  # the tensors that never travel: these, and counters of batches
    running_names: list[str] = field(init=False)  # of the tensors that are normalisation statistics
    local_norms: bool = field(init=False)  # whether normalisation statistics stay with the clients
    static_norms: bool = field(init=False)  # whether they come from a pass through each network, and not from training
    evaluator: Evaluator = field(init=False)
    watch: Watch = field(init=False)

    def __post_init__(self) -> None:
        self.options, self.local_norms = self.server.options, self.norm_policy == "local"
        model = self.server.builder.model
        self.running_names = running_names(model)
        self.at_home = frozenset(initial_statistics(model)) if self.local_norms else frozenset()
        self.static_norms = self.norm_policy in STATIC and bool(self.running_names)
        self.evaluator, self.watch = Evaluator(self.server, self.test), Watch(*self.server.kind.blind(self.server.classes))

    @cached_property
    def levels(self) -> dict[str, Profile]:
        """What devices of this run may afford, by the names of these levels; empty where the profile plugin does not say."""
        widths = (min(1.0, width / self.options.global_width) for width in self.plugins.declared_widths or ())
        return {profile.level: profile for profile in map(Profile, widths)}


class RoundState:
    """The round under way: who was sent what, where updates lay, and the row that becomes a line of metrics.csv."""

    def __init__(self, run: RunState, number: int, engine: Engine) -> None:
        self.run, self.number, self.engine = run, number, engine
        self.row = RoundRow(number)
        self.versions = dict(run.state_versions)  # of the clients' own states before this round
        self.assignments: dict[int, Assignment] = {}
        self.turns: dict[int, Turn] = {}  # under --fleet: what each client's part takes
        self.ends: float | None = None  # under --schedule semi and fedbuff: the simulated time of the merge
        self.limits = Limits(run.options.max_change, run.history.recent)
        self.coverage: list[Coverage] = []
        self.passes: list[ReceivedReply] = []  # of clients through their own parts of the new model, for its statistics
        self.aggregated = run.server.state  # the global model before fine-tuning on the server's data
        self._taken: dict[tuple[int, int], tuple[Plan, State, State]] = {}
        self.began = time.perf_counter(), run.clock.now if run.clock else 0.0  # of this machine, and simulated
        self._mark, self._phases = self.began[0], list[str]()

    def take(self, plan: Plan, source: State) -> State:
        """What `plan` takes of `source`, once a round for all clients that share both."""
        key = id(plan), id(source)
        if key not in self._taken:
            part = plan.take(source)
            self._taken[key] = plan, source, part if self.run.device == "cpu" else move_state(part, self.run.device)
        return self._taken[key][2]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announces a phase, and counts its seconds."""
        self.run.callback.phase(self.number, name)
        with self.timed(name):
            yield

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Counts the seconds within as those of phase `name`, and not of a phase around it."""
        self._count()
        self._phases.append(name)
        try:
            yield
        finally:
            self._count()
            self._phases.pop()

    def timed_items(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """`items`; waiting for each of them is timed as phase `name`."""
        waiting = iter(items)
        while True:
            with self.timed(name):
                found = [*itertools.islice(waiting, 1)]
            if not found:
                return
            yield found[0]

    def _count(self) -> None:
        now = time.perf_counter()
        if self._phases:
            self.row.phases[self._phases[-1]] = self.row.phases.get(self._phases[-1], 0.0) + now - self._mark
        self._mark = now

    def lines(self) -> dict[int, ClientRow]:
        """The line of each client that took part in the round, or whose update waits for a later merge."""
        return {client: late.row for client, late in self.run.underway.items()} | self.row.clients

    def alarm(self, text: str) -> None:
        """A note that nobody may overlook; it stands in the round's row too."""
        self.row.alarms.append(text)
        self.run.callback.alarm(f"round {self.number}: {text}")
