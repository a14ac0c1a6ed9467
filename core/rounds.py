"""The rounds of a run as a Flower Strategy: profile, extract, fit, recover, aggregate, evaluate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from hetfl.core import payload
from hetfl.core.apps import Desk, Down
from hetfl.core.data import Examples
from hetfl.core.errors import RunError, UsageError
from hetfl.core.grid import by_request, node
from hetfl.core.merge import Updates, mean
from hetfl.core.norms import running, statistics, without_statistics
from hetfl.core.plans import Plan
from hetfl.core.roles import Roles, put
from hetfl.core.server import Server
from hetfl.core.train import Score
from hetfl.core.types import Client, Profile, Reply, Returned
from hetfl.core.widths import State

Row = dict[str, Any]


class Watch(Protocol):
    """Who looks on while a run goes: the command line's display, or a test."""

    def phase(self, round: int, name: str) -> None: ...
    def done(self, row: Row) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(eq=False)
class Sent:
    """What one client was sent this round."""

    client: Client
    plan: Plan
    state: State
    travels: State  # of `state`, what crosses the network

    @property
    def bytes(self) -> int:
        return payload.size(self.travels) + payload.size(self.plan.extras)


@dataclass(eq=False)
class Progress:
    """What is known of the round under way; `row` becomes a line of metrics.csv, `clients` lines of clients.csv."""

    row: Row = field(default_factory=dict)
    clients: dict[int, Row] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    spent: int = 0


class Rounds(Strategy):
    """Drives a Server and the chosen plugins through `options.rounds` rounds over any Flower Grid."""

    def __init__(self, server: Server, roles: Roles, desk: Desk, test: Examples, clients: int, watch: Watch) -> None:
        self.server, self.roles, self.desk, self.test, self.clients, self.watch = server, roles, desk, test, clients, watch
        self.options = server.options
        self.rows: list[Row] = []
        self.client_rows: list[Row] = []
        self.levels: dict[str, Plan] = {}
        self.control = server.state
        self.policy = policy(self.options.norm_policy, roles.norm_policy, server)
        self._sent: dict[int, Sent] = {}
        self._messages: list[Message] = []
        self._extras: dict[int, State] = {}
        self._now = Progress()
        self._aggregated = server.state

    # Flower's moments of a round

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Samples clients, asks what each can afford, takes a submodel for each; one message a client."""
        chosen = sample(self.clients, self.options.fraction, self.server.stream("sample", server_round))
        with self.timed(server_round, "profile"):
            profiles = self._profiles(server_round, chosen, grid)
        clients = [Client(i, profiles[i], self._extras.get(i, {})) for i in chosen]
        refuse_uncut(self.server, clients)
        with self.timed(server_round, "extract"):
            plans = self.roles.extract(self.server, clients, server_round)
            refuse_unfit(plans, clients, self.roles)
            self._sent = {c.id: self._take(c, p) for c, p in zip(clients, plans, strict=True)}
        self._messages = [
            self._message(s.client.id, MessageType.TRAIN, self._down(s.travels, s.plan.sizes, extras=s.plan.extras))
            for s in self._sent.values()
        ]
        return self._messages

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Checks the replies, recovers and merges them into the next global model."""
        returned = [r for i, reply in by_request(self._messages, replies) if (r := self._accept(i, reply)) is not None]
        if returned:
            with self.timed(server_round, "recover"):
                updates = Updates(self.roles.recover(self.server, returned, server_round), self.server.state)
            with self.timed(server_round, "aggregate"):
                merged = self.roles.aggregate(self.server, updates, server_round)
            self.server.state, self.server.branches = merged.state, merged.branches
        return None, MetricRecord({"valid": len(returned)})

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Each client of the round gets its plan's part of the new global model for its own test data."""
        self._messages = [
            self._message(s.client.id, MessageType.EVALUATE, self._down(t.travels, s.plan.sizes))
            for s in self._sent.values()
            for t in [self._take(s.client, s.plan)]
        ]
        return self._messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        scores = [self._payload(reply) for _, reply in by_request(self._messages, replies) if reply.has_content()]
        spread(self._now.row, "submodel@own", [s["accuracy"] for s in scores if s])
        return None

    def summary(self) -> None:
        """Nothing to say before the run; the command line shows its options."""

    # the loop

    def start(  # type: ignore[override]
        self, grid: Grid, initial_arrays: ArrayRecord | None = None, num_rounds: int | None = None, **_: Any
    ) -> Result:
        """All rounds; the global model is `server.state` afterwards."""
        for round in range(1, (num_rounds or self.options.rounds) + 1):
            self.step(round, grid)
        return Result()

    def step(self, round: int, grid: Grid) -> None:
        """One round."""
        started, self._now = time.perf_counter(), Progress({"round": round})
        mark = sum(self.server.spent)
        messages = list(self.configure_train(round, ArrayRecord(), ConfigRecord(), grid))
        with self.timed(round, "fit"):
            replies = list(grid.send_and_receive(messages))
        self.aggregate_train(round, replies)
        self._normalise(round, grid)
        self._aggregated = self.server.state
        with self.timed(round, "finetune"):
            self.server.state = self.server.trained(self.server.state, self.options.server_finetune_steps, "finetune", round)
        self._now.spent = sum(self.server.spent) - mark
        last = round == self.options.rounds
        with self.timed(round, "evaluate"):
            self._evaluate(round, grid, last or round % self.options.eval_every == 0, last)
        self._close(time.perf_counter() - started)

    def _close(self, seconds: float) -> None:
        now = self._now
        people = list(now.clients.values())
        spread(now.row, "client@own", [c["own accuracy"] for c in people if "own accuracy" in c])
        now.row |= {
            "bytes down": sum(c["bytes down"] for c in people), "bytes up": sum(c["bytes up"] for c in people),
            "clients": len(people), "left out": sum("fault" in c for c in people),
            "client seconds": sum(c.get("seconds", 0.0) for c in people), "seconds": seconds, "server steps": now.spent,
            **{f"seconds {name}": value for name, value in now.seconds.items()},
        }  # fmt: skip
        self.rows.append(now.row)
        self.client_rows += people
        self.watch.done(now.row)

    @contextmanager
    def timed(self, round: int, phase: str) -> Iterator[None]:
        self.watch.phase(round, phase)
        started = time.perf_counter()
        yield
        self._now.seconds[phase] = self._now.seconds.get(phase, 0.0) + time.perf_counter() - started

    # parts of a round

    def _take(self, client: Client, plan: Plan) -> Sent:
        state = plan.take(self.server.state)
        return Sent(client, plan, state, self._travels(state))

    def _down(self, state: State, sizes: Mapping[str, int] | None, **more: Any) -> Down:
        local = self.policy == "local"
        return Down(self._now.row["round"], state, None if sizes is None else dict(sizes), local=local, **more)

    def _travels(self, state: State) -> State:
        """What of `state` crosses the network under the policy for normalisation."""
        return without_statistics(state, self.server.workshop.module()) if self.policy == "local" else state

    def _message(self, client: int, kind: str, content: object) -> Message:
        return Message(self.desk.seal(content), node(client), kind, group_id=str(self._now.row.get("round", 0)))

    def _payload(self, reply: Message) -> Any:
        return self.desk.open(reply.content)

    def _profiles(self, round: int, clients: Sequence[int], grid: Grid) -> dict[int, Profile]:
        asked = [self._message(i, MessageType.QUERY, round) for i in clients]
        answers = by_request(asked, grid.send_and_receive(asked))
        for i, reply in answers:
            if reply.has_error():
                raise RunError(f"the profile of client {i} failed in round {round}: {last_line(reply)}")
        return {i: self._payload(reply) for i, reply in answers}

    def _accept(self, client: int, message: Message) -> Returned | None:
        """A client's reply if it can be used; otherwise the client is left out, with the reason in the run folder."""
        sent = self._sent[client]
        row: Row = {"round": self._now.row["round"], "client": client, "level": sent.client.profile.level}
        row |= {"bytes down": sent.bytes, "bytes up": 0}
        self._now.clients[client] = row
        if message.has_error():
            row["fault"], row["traceback"] = last_line(message), message.error.reason
        else:
            reply: Reply = self._payload(message)
            row |= {"examples": reply.examples, **reply.metrics}
            row["bytes up"] = payload.size(reply.state) + payload.size(reply.extras)
            fault = payload.fault(reply, sent.travels, self.roles.up)
            if fault is None:
                self._extras[client] = reply.extras
                reply.state = {name: reply.state.get(name, tensor) for name, tensor in sent.state.items()}
                return Returned(sent.client, sent.plan, sent.state, reply)
            row["fault"] = fault
        self.watch.note(f"round {row['round']}: client {client} left out: {row['fault']}")
        return None

    def _normalise(self, round: int, grid: Grid) -> None:
        """Gives the new global model its normalisation statistics, where the policy is not to average them."""
        names = running(self.server.workshop.module())
        if not names or self.policy == "aggregate":
            return
        with self.timed(round, "statistics"):
            merged = self._passes(round, grid) if self.policy == "static" else self._recalibrated()
        self.server.state = {**self.server.state, **{name: merged[name] for name in names if name in merged}}

    def _passes(self, round: int, grid: Grid) -> State:
        state = self.server.state
        self._messages = [
            self._message(s.client.id, "train.passes", self._down(s.plan.take(state), s.plan.sizes)) for s in self._sent.values()
        ]
        answers = by_request(self._messages, grid.send_and_receive(self._messages))
        replies = [(i, self._payload(reply)) for i, reply in answers if reply.has_content()]
        whole = [Returned(self._sent[i].client, self._sent[i].plan, {}, r) for i, r in replies if r.examples]
        updates = Updates([put(r) for r in whole], state)
        return mean(updates, updates.weights) if whole else state

    def _recalibrated(self) -> State:
        data = self.server.public.tune
        model = self.server.workshop.loaded(self.server.state)
        return statistics(model, data.batches(self.options.eval_batch_size, None))[0]

    def _evaluate(self, round: int, grid: Grid, wanted: bool, last: bool) -> None:
        """Test accuracies by their (model, split) names, and one round of the server-only control beside them."""
        jobs: dict[str, Callable[[], Score]] = self._jobs() if wanted else {}
        train_control: Callable[[], Any] = partial(self._train_control, round)
        results = self.server.pool.map(lambda job: job(), [train_control, *jobs.values()])
        for name, score in zip(jobs, results[1:], strict=True):
            self._now.row |= {name: score.accuracy, f"{name} loss": score.loss}
        if wanted and self._has_control:
            score = self.server.score(self.control, self.test)
            self._now.row |= {"control@test": score.accuracy, "control@test loss": score.loss}
        if wanted:
            messages = self.configure_evaluate(round, ArrayRecord(), ConfigRecord(), grid)
            self.aggregate_evaluate(round, grid.send_and_receive(messages))
        if last:
            self._masked(round, grid)

    @property
    def _has_control(self) -> bool:
        return self.options.control and self.server.has_public

    def _train_control(self, round: int) -> None:
        if self._has_control:
            self.control = self.server.trained(self.control, self._now.spent, "control", round)

    def _jobs(self) -> dict[str, Callable[[], Score]]:
        state, jobs = self._aggregated, dict[str, Callable[[], Score]]()
        jobs["global@test"] = partial(self.server.score, state, self.test)
        if self.options.server_finetune_steps:
            jobs["sent@test"] = partial(self.server.score, self.server.state, self.test)
        for sent in self._sent.values():
            level = sent.client.profile.level
            if f"level-{level}@test" not in jobs:
                self.levels[level] = sent.plan
                jobs[f"level-{level}@test"] = partial(self._score, sent.plan, sent.plan.take(state))
                jobs[f"sent-{level}@test"] = partial(self._score, sent.plan, sent.state)
        return jobs

    def _score(self, plan: Plan, state: State) -> Score:
        return self.server.score(state, self.test, plan.sizes)

    def _masked(self, round: int, grid: Grid) -> None:
        """The global model on each client's own test data, logits of classes it does not hold put to 0 (spec heterofl 5.2)."""
        asked = [
            self._message(s.client.id, MessageType.EVALUATE, self._down(self._travels(self._aggregated), None, masked=True))
            for s in self._sent.values()
        ]
        answers = by_request(asked, grid.send_and_receive(asked))
        scores = [self._payload(reply) for _, reply in answers if reply.has_content()]
        spread(self._now.row, "global@own masked", [s["accuracy"] for s in scores if s])


def sample(clients: int, fraction: float, generator: torch.Generator) -> list[int]:
    """The round's clients: ceil(fraction * clients) of them, without replacement, in id order."""
    count = max(1, math.ceil(fraction * clients - 1e-9))
    return sorted(torch.randperm(clients, generator=generator)[:count].tolist())


def policy(given: str, wanted: str | None, server: Server) -> str:
    """The policy for normalisation statistics: as given, else what a plugin asks for, else averaging."""
    chosen = (wanted or "aggregate") if given == "auto" else given
    if chosen in ("recalibrate", "local") and not server.has_public:
        raise UsageError(
            f"--norm-policy {chosen} needs public data on the server, for the global model's own statistics; "
            "give it some with --server-data 0.05"
        )
    return chosen


def refuse_uncut(server: Server, clients: Sequence[Client]) -> None:
    if not server.widths.groups and any(c.profile.width < 1 for c in clients):
        why = "; ".join(f"{name}: {reason}" for name, reason in list(server.widths.frozen.items())[:3])
        raise UsageError(f"no width of this model can be cut ({why}), so only --levels 1 is possible with it")


def refuse_unfit(plans: Sequence[Plan], clients: Sequence[Client], roles: Roles) -> None:
    """A plugin's mistake, said before anything is sent."""
    if len(plans) != len(clients):
        raise RunError(f"the extraction gave {len(plans)} plans for {len(clients)} clients")
    if fault := next((f for p in plans if (f := payload.undeclared(p.extras, roles.down))), None):
        raise RunError(f"the extraction sends what it did not declare: {fault}")


def spread(row: Row, name: str, values: Sequence[float]) -> None:
    """Mean and worst decile over clients, under the metric's name."""
    if values:
        ordered = sorted(values)
        row[name] = sum(values) / len(values)
        row[f"{name} p10"] = ordered[int(0.1 * (len(ordered) - 1))]


def last_line(message: Message) -> str:
    lines = (message.error.reason or "no reason given").strip().splitlines()
    return lines[-1]
