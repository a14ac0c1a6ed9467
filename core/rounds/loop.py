"""The rounds of a run as a Flower Strategy: profile, extract, fit, recover, aggregate, evaluate."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from hetfl.aggregation.mean import Fold, mean
from hetfl.aggregation.updates import Merged, Update, Updates
from hetfl.config import RunOptions
from hetfl.data.dataset import Examples
from hetfl.engines.local import by_request, node
from hetfl.errors import RunError, UsageError
from hetfl.hooks.manager import PluginManager
from hetfl.hooks.server import Server
from hetfl.hooks.values import Client, Coverage, ReceivedReply, put_back
from hetfl.models.normalization import drop_statistics, measure_statistics, running_names
from hetfl.models.state import State
from hetfl.profiling.meter import Meter
from hetfl.profiling.node import Profile
from hetfl.rounds import validation
from hetfl.rounds.alarms import Alarms
from hetfl.rounds.client import Transport
from hetfl.rounds.evaluation import EvalJob, Evaluator
from hetfl.rounds.messages import Assignment, Instruction, Row
from hetfl.rounds.reporting import Callback, add_mean_and_decile, device_costs
from hetfl.rounds.validation import ReplyValidator, traceback_row
from hetfl.submodel.plan import Plan


@dataclass(eq=False)
class Progress:
    """What is known of the round under way; `row` becomes a line of metrics.csv, `clients` lines of clients.csv."""

    row: Row = field(default_factory=dict)
    clients: dict[int, Row] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    spent: int = 0
    saved: int = 0  # before the round
    taken: dict[tuple[int, int], tuple[Plan, State, State]] = field(default_factory=dict)


class Rounds(Strategy):
    """Drives a Server and the chosen plugins through `options.rounds` rounds over any Flower Grid."""

    def __init__(
        self, server: Server, roles: PluginManager, desk: Transport, test: Examples, clients: int, watch: Callback, meter: Meter
    ) -> None:
        self.meter = meter
        self.server, self.roles, self.desk, self.test, self.clients, self.watch = server, roles, desk, test, clients, watch
        self.options = server.options
        self.rows: list[Row] = []
        self.client_rows: list[Row] = []
        self.control = self.first = server.state
        refuse_too_many(self.options, clients)
        self.policy = norm_policy(self.options.norm_policy, roles.norm_policy, server.has_public)
        self._sent: dict[int, Assignment] = {}
        self._messages: list[Message] = []
        self.extras: dict[int, State] = {}
        self.last_round: dict[int, int] = {}
        self.remembers: dict[int, int] = {}  # client -> the round that its memory is of
        self._now = Progress()
        self.intake = ReplyValidator(server, roles, desk, self._travels)
        self._aggregated = server.state
        self.alarms = Alarms(server.classes)
        self.exams = Evaluator(server, test, self._taken)

    # Flower's moments of a round

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Samples clients, asks what each can afford, takes a submodel for each; one message a client."""
        chosen = sample(self.clients, self.options.fraction, self.server.stream("sample", server_round))
        self._grid, self._sent, self._covered = grid, {}, list[Coverage]()
        self.server.sampled, self.server.population, self.server.averages = len(chosen), self.clients, self.roles.averages
        with self.timed(server_round, "profile"):
            profiles = self._profiles(server_round, chosen, grid)
        clients = [Client(i, profile, self.extras.get(i, {}), self.last_round.get(i, 0)) for i, profile in profiles.items()]
        self.server.clients |= {client.id: client for client in clients}
        with self.timed(server_round, "extract"):
            plans = self.roles.extract(self.server, clients, server_round) if clients else []
            refuse_unfit(plans, clients)
            refuse_uncut(self.server, clients, plans)
            taken = [self._take(c, p) for c, p in zip(clients, plans, strict=True) if p is not None]
            self._sent = {s.client.id: self._briefed(s, server_round) for s in taken}
            refuse_undeclared(self._sent.values(), self.roles)
        self._messages = [self._order(s) for s in self._sent.values()]
        return self._messages

    def _order(self, sent: Assignment) -> Message:
        """The message that has a client train."""
        return self._message(sent.client.id, MessageType.TRAIN, self._down(sent, extras=sent.extras, up=self._up(sent)))

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Checks the replies, recovers and merges them into the next global model; as they come, where the aggregation can."""
        fold = self.roles.stream(self.server, server_round)
        valid = self._valid(replies, server_round)
        merged, count = self._streamed(fold, valid, server_round) if fold else self._together(list(valid), server_round)
        if merged is not None and self.roles.finalizes:
            merged = self.roles.finalize(self.server, merged, self._covered, server_round)
        if merged is None or not finite(merged):
            self._keep(server_round, count, merged is not None)
        else:
            self.server.state, self.server.branches = merged.state, dict(merged.branches)
            self._now.row |= merged.facts
        return None, MetricRecord({"valid": count})

    def _keep(self, round: int, count: int, spoilt: bool) -> None:
        """Says why the global model stays as it was."""
        if spoilt:
            self._alarm(f"round {round}: what was merged holds NaN or infinity; the global model stays as it was")
        elif self._sent:
            few = f"{count} of the {self.options.min_clients} valid replies that a round needs (--min-clients)"
            self._alarm(f"round {round}: {few}; the global model stays as it was")

    def _alarm(self, text: str) -> None:
        """A note that nobody may overlook; it stands in the round's row too."""
        self._now.row["alarms"] = "; ".join(filter(None, [self._now.row.get("alarms"), text.split(": ", 1)[-1]]))
        self.watch.alarm(text)

    def _valid(self, replies: Iterable[Message], round: int) -> Iterator[ReceivedReply]:
        """The replies that can be used, in client order; waiting for them is the clients' time."""
        arriving = by_request(self._messages, replies)
        self.watch.phase(round, "fit")
        while True:
            with self._counted("fit"):
                client, reply = next(arriving, (None, None))
            if client is None or reply is None:
                break
            returned = self._accept(client, reply)
            if returned is None and self.options.on_client_error == "retry":
                returned = self._again(client, self._grid)
            if returned is not None:
                yield returned
        for client in self._sent.keys() - self._now.clients.keys():
            self._refuse(client, "it gave no answer")

    def _streamed(self, fold: Fold, valid: Iterable[ReceivedReply], round: int) -> tuple[Merged | None, int]:
        count = 0
        for returned in valid:
            with self._counted("recover"):
                updates = self.roles.recover(self.server, [returned], round)
            with self._counted("aggregate"):
                for update in updates:
                    self._cover(update, returned)
                    fold.add(update)
            count += 1
        with self.timed(round, "aggregate"):
            return fold.result() if count >= self.options.min_clients else None, count

    def _together(self, returned: list[ReceivedReply], round: int) -> tuple[Merged | None, int]:
        if len(returned) < self.options.min_clients:
            return None, len(returned)
        with self.timed(round, "recover"):
            updates = Updates(self.roles.recover(self.server, returned, round), self.server.state)
        by_client = {r.client.id: r for r in returned}
        for update in updates:
            self._cover(update, by_client[update.client])
        with self.timed(round, "aggregate"):
            return self.roles.aggregate(self.server, updates, round), len(returned)

    def _cover(self, update: Update, returned: ReceivedReply) -> None:
        """Notes where an update lies, for plugins that have a last word."""
        if self.roles.finalizes:
            reply, nothing = returned.reply, torch.empty(0)
            patches = {name: replace(patch, values=nothing) for name, patch in update.patches.items()}
            self._covered.append(Coverage(update.client, patches, bool(reply.extras or reply.kept or reply.masks)))

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Each client of the round gets its plan's part of the new global model, or its own model, for its own test data."""
        self._sent = {i: self._take(s.client, s.plan) for i, s in self._sent.items()}
        self._messages = [self._message(i, MessageType.EVALUATE, self._down(s)) for i, s in self._sent.items()]
        return self._messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        answers = by_request(self._messages, replies)
        scores = [(self._sent[i].personal, self.intake.scores(reply)) for i, reply in answers]
        for personal, name in ((False, "submodel@own"), (True, "personal@own")):
            add_mean_and_decile(self._now.row, name, [s["accuracy"] for own, s in scores if s and own == personal])
        return None

    def summary(self) -> None:
        """Nothing to say before the run; the command line shows its options."""

    # the loop

    def start(  # type: ignore[override]
        self, grid: Grid, initial_arrays: ArrayRecord | None = None, num_rounds: int | None = None, **_: Any
    ) -> Result:
        """All rounds that are not done yet; the global model is `server.state` afterwards."""
        for round in range(len(self.rows) + 1, (num_rounds or self.options.rounds) + 1):
            self.step(round, grid)
        return Result()

    def step(self, round: int, grid: Grid) -> None:
        """One round."""
        started, self._now = time.perf_counter(), Progress({"round": round})
        mark = sum(self.server.spent)
        self._now.saved = sum(steps for steps, _ in self.server.saved)
        messages = list(self.configure_train(round, ArrayRecord(), ConfigRecord(), grid))
        with self._counted("fit"):
            replies = grid.send_and_receive(messages)
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
        costs: dict[int, Row] = {}  # by plan: clients of a level share theirs
        for client, sent in ((i, s) for i, s in self._sent.items() if i in now.clients):
            if id(sent.plan) not in costs:
                costs[id(sent.plan)] = device_costs(self.meter.of(sent.plan.sizes, sent.plan.model), sent)
            now.clients[client] |= costs[id(sent.plan)]
        add_mean_and_decile(now.row, "client@own", [c["own accuracy"] for c in people if "own accuracy" in c])
        now.row |= {
            "bytes down": sum(c["bytes down"] for c in people), "bytes up": sum(c["bytes up"] for c in people),
            "clients": len(people), "left out": sum("fault" in c for c in people),
            "client seconds": sum(c.get("seconds", 0.0) for c in people), "seconds": seconds, "server steps": now.spent,
            "server steps saved": sum(steps for steps, _ in self.server.saved) - now.saved,
            **{f"seconds {name}": value for name, value in now.seconds.items()},
        }  # fmt: skip
        self.rows.append(now.row)
        self.client_rows += people
        for text in [*dict.fromkeys(self.server.alarms), *self.alarms.look(self.rows, self.client_rows)]:
            self._alarm(f"round {now.row['round']}: {text}")
        self.server.alarms.clear()
        self.watch.done(now.row)

    @contextmanager
    def timed(self, round: int, phase: str) -> Iterator[None]:
        self.watch.phase(round, phase)
        with self._counted(phase):
            yield

    @contextmanager
    def _counted(self, phase: str) -> Iterator[None]:
        """Adds the seconds within to `phase`."""
        started = time.perf_counter()
        yield
        self._now.seconds[phase] = self._now.seconds.get(phase, 0.0) + time.perf_counter() - started

    # parts of a round

    def _take(self, client: Client, plan: Plan) -> Assignment:
        source = self.roles.base_state(self.server, client)
        state = self._taken(plan, source)
        shares = self.roles.exchange(self.server, client, tuple(state))
        travels = {name: t for name, t in state.items() if shares.down is None or name in shares.down}
        own = len(travels) < len(state) or source is not self.server.state
        up = frozenset(state if shares.up is None else (name for name in state if name in shares.up))
        return Assignment(client, plan, source, state, self._travels(travels), up, own)

    def _taken(self, plan: Plan, source: State) -> State:
        """What `plan` takes of `source`, once a round for all clients that share both."""
        key = id(plan), id(source)
        if key not in self._now.taken:
            self._now.taken[key] = plan, source, plan.take(source)
        return self._now.taken[key][2]

    def _briefed(self, sent: Assignment, round: int) -> Assignment:
        return replace(sent, extras=self.roles.client_extras(self.server, sent.client, sent.plan, round))

    def _down(self, sent: Assignment, **more: Any) -> Instruction:
        plan, local = sent.plan, self.policy == "local"
        sizes, round = dict(plan.sizes), self._now.row["round"]
        remembers = self.remembers.get(sent.client.id, 0)
        return Instruction(round, sent.travels, sizes, plan.model, plan.masks, local=local, remembers=remembers, **more)

    def _up(self, sent: Assignment) -> frozenset[str] | None:
        return None if len(sent.up) == len(sent.state) else sent.up

    def _travels(self, state: State) -> State:
        """What of `state` crosses the network under the policy for normalisation."""
        return drop_statistics(state, self.server.builder.module()) if self.policy == "local" else state

    def _message(self, client: int, kind: str, content: object) -> Message:
        return Message(self.desk.seal(content), node(client), kind, group_id=str(self._now.row.get("round", 0)))

    def _profiles(self, round: int, clients: Sequence[int], grid: Grid) -> dict[int, Profile]:
        asked = [self._message(i, MessageType.QUERY, round) for i in clients]
        answers = dict(by_request(asked, grid.send_and_receive(asked)))
        found = {i: self.intake.profile(answers.get(i)) for i in clients}
        for i, profile in found.items():
            if isinstance(profile, str):
                self._refuse(i, f"its profile: {profile}", **traceback_row(answers.get(i)))
        good = {i: profile for i, profile in found.items() if isinstance(profile, Profile)}
        if round == 1 and not good:
            raise RunError(f"no client can take part; the profile of client {clients[0]}: {found[clients[0]]}")
        return good

    def _accept(self, client: int, message: Message) -> ReceivedReply | None:
        """A client's reply if it can be used; otherwise the client is left out, with the reason in the run folder."""
        intake = self.intake.take(self._sent[client], message)
        if not message.has_error():
            self.remembers[client] = self._now.row["round"]
        row = self._row(client) | {"bytes down": intake.sent.bytes, "bytes up": 0} | intake.row
        self._now.clients[client] = row
        if intake.fault is not None:
            self._refuse(client, intake.fault)
            return None
        reply = intake.reply
        now = Client(client, intake.sent.client.profile, reply.extras, row["round"])
        self._sent[client] = replace(intake.sent, client=now)
        self.extras[client], self.last_round[client] = reply.extras, row["round"]
        return ReceivedReply(now, intake.sent.plan, intake.sent.state, reply)

    def _row(self, client: int) -> Row:
        """The beginning of a client's line in clients.csv."""
        row: Row = {"round": self._now.row["round"], "client": client}
        if (sent := self._sent.get(client)) is not None:
            row["level"] = sent.client.profile.level
            row |= {"bottleneck": sent.client.profile.bottleneck} if sent.client.profile.bottleneck else {}
        return row

    def _refuse(self, client: int, fault: str, **more: Any) -> None:
        """Leaves a client out of the round, and says so. Raises RunError where the run is not to go on without it."""
        row = self._now.clients.setdefault(client, self._row(client) | {"bytes down": 0, "bytes up": 0})
        row |= {"fault": fault, **more}
        self.last_round[client] = 0
        if self.options.on_client_error == "fail":
            raise RunError(f"client {client} failed in round {row['round']}: {fault} (--on-client-error fail)")
        self.watch.note(f"round {row['round']}: client {client} left out: {fault}")

    def _again(self, client: int, grid: Grid) -> ReceivedReply | None:
        """Asks a client that failed once more."""
        message = self._order(self._sent[client])
        found = by_request([message], grid.send_and_receive([message]))
        return next((returned for i, reply in found if (returned := self._accept(i, reply)) is not None), None)

    def _normalise(self, round: int, grid: Grid) -> None:
        """Gives the new global model its normalisation statistics, where the policy is not to average them."""
        names = running_names(self.server.builder.module())
        if not names or self.policy == "aggregate":
            return
        with self.timed(round, "statistics"):
            merged = self._passes(round, grid) if self.policy == "static" else self._recalibrated()
        self.server.state = {**self.server.state, **{name: merged[name] for name in names if name in merged}}

    def _passes(self, round: int, grid: Grid) -> State:
        state = self.server.state
        sent = [replace(s, travels=self._taken(s.plan, state)) for s in self._sent.values() if s.plan.model is None]
        self._messages = [self._message(s.client.id, "train.passes", self._down(s)) for s in sent]
        expected = {s.client.id: s.travels for s in sent}
        answers = by_request(self._messages, grid.send_and_receive(self._messages))
        replies = [(i, self.intake.statistics(expected[i], reply)) for i, reply in answers]
        whole = [ReceivedReply(self._sent[i].client, self._sent[i].plan, {}, r) for i, r in replies if r is not None and r.examples]
        updates = Updates([put_back(r) for r in whole], state)
        return mean(updates, updates.weights) if whole else state

    def _recalibrated(self) -> State:
        data = self.server.public.tune
        model = self.server.builder.load(self.server.state)
        return measure_statistics(model, data.batches(self.options.eval_batch_size, None))[0]

    def _evaluate(self, round: int, grid: Grid, wanted: bool, last: bool) -> None:
        """Test accuracies by their (model, split) names, and one round of the server-only control beside them."""
        scores = self.exams.scores(self._candidates() if wanted else {}, partial(self._train_control, round))
        for name, score in scores.items():
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

    def _candidates(self) -> dict[str, EvalJob]:
        """What is tested on the test split after a round."""
        found = {"global@test": EvalJob(self._aggregated)}
        if self.options.server_finetune_steps:
            found["sent@test"] = EvalJob(self.server.state)
        for level, sent in {s.client.profile.level: s for s in reversed(self._sent.values())}.items():
            source = self.roles.base_state(self.server, sent.client)
            if sent.plan.model is None:
                found[f"level-{level}@test"] = EvalJob(self._aggregated, sent.plan)
            if source is not self.server.state:
                found[f"personal-{level}@test"] = EvalJob(source, sent.plan)
            elif not sent.personal:
                found[f"sent-{level}@test"] = EvalJob(sent.source, sent.plan)
        return dict(sorted(found.items(), key=lambda item: order(item[0])))

    def _masked(self, round: int, grid: Grid) -> None:
        """The global model on each client's own test data, logits of classes it does not hold put to 0 (spec heterofl 5.2)."""
        state, local = self._travels(self._aggregated), self.policy == "local"
        down = Instruction(round, state, None, local=local, held=True)
        asked = [self._message(i, MessageType.EVALUATE, replace(down, remembers=self.remembers.get(i, 0))) for i in self._sent]
        answers = by_request(asked, grid.send_and_receive(asked))
        scores = [self.intake.scores(reply) for _, reply in answers]
        add_mean_and_decile(self._now.row, "global@own masked", [s["accuracy"] for s in scores if s])


def order(name: str) -> tuple[bool, float]:
    """Whole models first, then levels from the widest."""
    level = name.split("@")[0].partition("-")[2]
    return bool(level), -float(level or 0)


def sample(clients: int, fraction: float, generator: torch.Generator) -> list[int]:
    """The round's clients: ceil(fraction * clients) of them, without replacement, in id order."""
    return sorted(torch.randperm(clients, generator=generator)[: sample_size(clients, fraction)].tolist())


def sample_size(clients: int, fraction: float) -> int:
    """How many clients take part in a round."""
    return max(1, math.ceil(fraction * clients - 1e-9))


def norm_policy(given: str, wanted: str | None, public: bool) -> str:
    """The policy for normalisation statistics: as given, else what a plugin asks for, else averaging."""
    chosen = (wanted or "aggregate") if given == "auto" else given
    if chosen in ("recalibrate", "local") and not public:
        raise UsageError(
            f"--norm-policy {chosen} needs public data on the server, for the global model's own statistics; "
            "give it some with --server-data 0.05"
        )
    return chosen


def refuse_uncut(server: Server, clients: Sequence[Client], plans: Sequence[Plan | None]) -> None:
    """Where nothing can be cut, a narrower client would train the whole model."""
    whole = any(p is not None and p.model is None and not p.masks for p in plans)
    if not server.widths.groups and whole and any(c.profile.width < 1 for c in clients):
        why = "; ".join(f"{name}: {reason}" for name, reason in list(server.widths.frozen.items())[:3])
        raise UsageError(f"no width of this model can be cut ({why}), so only --levels 1 is possible with it")


def refuse_unfit(plans: Sequence[Plan | None], clients: Sequence[Client]) -> None:
    """A plugin's mistake, said before anything is sent."""
    if len(plans) != len(clients):
        raise RunError(f"the extraction gave {len(plans)} plans for {len(clients)} clients")


def refuse_too_many(options: RunOptions, clients: int) -> None:
    """A round cannot have more replies than clients."""
    if options.min_clients > (count := sample_size(clients, options.fraction)):
        raise UsageError(f"--min-clients {options.min_clients} is more than the {count} clients of a round")


def refuse_undeclared(sent: Iterable[Assignment], roles: PluginManager) -> None:
    if fault := next((f for s in sent if (f := validation.extras_fault(s.extras, roles.extras_down))), None):
        raise RunError(f"a plugin sends what it did not declare: {fault}")


def finite(merged: Merged) -> bool:
    """Whether the next global model, and every branch, is all numbers."""
    branches = (patch.values for patches in merged.branches.values() for patch in patches.values())
    return all(validation.finite(t) for t in (*merged.state.values(), *branches) if t.is_floating_point())
