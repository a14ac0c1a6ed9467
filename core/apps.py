"""The client side of a run as a Flower ClientApp: profile, train, pass for statistics, evaluate."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from hetfl.core.config import RunOptions
from hetfl.core.data import Examples, Federation
from hetfl.core.norms import statistics, unset, without_statistics
from hetfl.core.roles import Roles
from hetfl.core.train import evaluate
from hetfl.core.types import Node, Profile, Reply, Task
from hetfl.core.widths import State, load
from hetfl.core.workshop import Workshop


@dataclass(frozen=True, eq=False)
class Down:
    """What a client is sent: the tensors of its submodel, that submodel's sizes (None: the whole model), and extras.

    `local`: normalisation statistics stay with the clients, so they are not among the tensors.
    """

    round: int
    state: State
    sizes: dict[str, int] | None
    extras: State = field(default_factory=dict)
    masked: bool = False
    local: bool = False


class Desk:
    """Where payloads wait for the message that names them: in one process, tensors are handed over and not copied."""

    def __init__(self) -> None:
        self._numbers, self._waiting, self._lock = itertools.count(), dict[int, object](), threading.Lock()

    def seal(self, payload: object) -> RecordDict:
        """The content of a message that carries `payload`."""
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = payload
        return RecordDict({"payload": ConfigRecord({"number": number})})

    def open(self, content: RecordDict) -> object:
        """The payload of a message, once."""
        record = content["payload"]
        assert isinstance(record, ConfigRecord)
        with self._lock:
            return self._waiting.pop(int(str(record["number"])))


@dataclass(frozen=True, eq=False)
class Site:
    """What every client has at hand: its data, the plugins and the means to build submodels."""

    options: RunOptions
    federation: Federation
    roles: Roles
    workshop: Workshop
    desk: Desk

    def profile(self, message: Message, context: Context) -> Profile:
        round = self.desk.open(message.content)
        assert isinstance(round, int)
        return self.roles.profile(Node(place(context), len(self.federation.clients), round, self.options.seed))

    def train(self, message: Message, context: Context) -> Reply:
        down, started = self._down(message), time.perf_counter()
        task = self._task(down, context)
        reply = self.roles.fit(task)
        remember(context, task.memory)
        reply.metrics["seconds"] = time.perf_counter() - started
        own = self._own(down, reply, context)
        if len(own):
            score = evaluate(self.workshop.loaded(reply.state, down.sizes), own, self.options.eval_batch_size)
            reply.metrics |= {"own accuracy": score.accuracy, "own loss": score.loss}
        if down.local:
            reply.state = without_statistics(reply.state, self.workshop.module(down.sizes))
        return reply

    def passes(self, message: Message, context: Context) -> Reply:
        """Normalisation statistics of the sent submodel on this client's examples (spec heterofl 2.4)."""
        down, data = self._down(message), self._holding(context).train
        model = self._model(down)
        state, batches = statistics(model, data.batches(self.options.eval_batch_size, None))
        return Reply(state, batches)

    def evaluate(self, message: Message, context: Context) -> dict[str, float]:
        down, holding = self._down(message), self._holding(context)
        if not len(holding.test):
            return {}
        labels, size = holding.labels if down.masked else None, self.options.eval_batch_size
        model = self._model(down)
        if down.local:
            statistics(model, holding.train.batches(size, None))
        score = evaluate(model, holding.test, size, labels)
        return {"accuracy": score.accuracy, "loss": score.loss, "examples": float(score.examples)}

    def _model(self, down: Down) -> nn.Module:
        """The sent submodel; statistics that stay with the clients start anew."""
        model = self.workshop.module(down.sizes)
        return load(model, {**unset(model), **down.state} if down.local else down.state)

    def _down(self, message: Message) -> Down:
        payload = self.desk.open(message.content)
        assert isinstance(payload, Down)
        return payload

    def _holding(self, context: Context):  # type: ignore[no-untyped-def]  # noqa: ANN202
        return self.federation.clients[place(context)]

    def _own(self, down: Down, reply: Reply, context: Context) -> Examples:
        holding: Examples = self._holding(context).test
        return holding if reply.plan is None else Examples(holding.x, holding.y, holding.index[:0])

    def _task(self, down: Down, context: Context) -> Task:
        full = self.workshop.full
        return Task(
            client=place(context), round=down.round, model=self._model(down),
            data=self._holding(context), options=self.options, plan_sizes=down.sizes or full, full_sizes=full,
            extras=down.extras, memory=recall(context), draws=self.workshop.widths.draws,
        )  # fmt: skip


def client_app(site: Site) -> ClientApp:
    """The ClientApp of a run. Kinds of message: query (profile), train, train.passes (statistics), evaluate."""
    app = ClientApp()

    def answer(work: Callable[[Message, Context], object]) -> Callable[[Message, Context], Message]:
        return lambda message, context: Message(site.desk.seal(work(message, context)), reply_to=message)

    app.query()(answer(site.profile))
    app.train()(answer(site.train))
    app.train("passes")(answer(site.passes))
    app.evaluate()(answer(site.evaluate))
    return app


def place(context: Context) -> int:
    """A client is its partition; node ids are the engine's own affair."""
    return int(context.node_config["partition-id"])


def recall(context: Context) -> dict[str, Tensor]:
    """What the client remembers of earlier rounds."""
    record = context.state.get("memory")
    return record.to_torch_state_dict() if isinstance(record, ArrayRecord) else {}


def remember(context: Context, memory: dict[str, Tensor]) -> None:
    if memory or "memory" in context.state:
        context.state["memory"] = ArrayRecord(memory)
