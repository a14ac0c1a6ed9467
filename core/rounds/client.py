"""The client side of a run as a Flower ClientApp: profile, train, pass for statistics, evaluate."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from hetfl.config import RunOptions
from hetfl.data.dataset import ClientData, FederatedDataset
from hetfl.hooks.manager import PluginManager
from hetfl.models.normalization import drop_statistics, initial_statistics, measure_statistics
from hetfl.models.state import State, load_state, tensors
from hetfl.profiling.meter import Meter
from hetfl.profiling.node import Node, Profile
from hetfl.rounds.messages import Instruction
from hetfl.submodel import encoding
from hetfl.submodel.blocks import take
from hetfl.submodel.builder import SubmodelBuilder
from hetfl.submodel.widths import within
from hetfl.training.evaluation import evaluate
from hetfl.training.task import Reply, Task


class HandOver:
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

    def peek(self, content: RecordDict) -> object:
        """The payload of a message that nobody has opened yet."""
        record = content["payload"]
        assert isinstance(record, ConfigRecord)
        return self._waiting[int(str(record["number"]))]

    def pack(self, reply: Reply, masks: Mapping[str, Tensor]) -> Reply:
        """Nothing is packed that does not travel; what travelling would lose is lost here too."""
        return replace(reply, state=encoding.simulate_transfer(reply.state, masks, reply.code)) if reply.code else reply


class Transport(Protocol):
    """How payloads get into messages and out again: by reference (`Desk`) or written out (`wire.Wire`)."""

    def seal(self, payload: Any) -> RecordDict: ...
    def open(self, content: RecordDict) -> Any: ...
    def peek(self, content: RecordDict) -> Any: ...
    def pack(self, reply: Reply, masks: Mapping[str, Tensor]) -> Reply: ...


@dataclass(frozen=True, eq=False)
class ClientRuntime:
    """What every client has at hand: its data, the plugins and the means to build submodels."""

    options: RunOptions
    federation: FederatedDataset
    roles: PluginManager
    builder: SubmodelBuilder
    desk: Transport
    meter: Meter

    def profile(self, message: Message, context: Context) -> Profile:
        round, client = self.desk.open(message.content), client_id(context)
        assert isinstance(round, int)
        data = self.federation.clients[client].train
        return self.roles.profile(
            Node(
                client, len(self.federation.clients), round, self.options.seed,
                self.meter.cost, partial(self.meter.seconds, data),
                self.options.epochs * len(data), self.options.epochs * -(-len(data) // self.options.batch_size),
            )
        )  # fmt: skip

    def train(self, message: Message, context: Context) -> Reply:
        down, started = self._down(message), time.perf_counter()
        task = self._task(down, context)
        reply = self.roles.fit(task)
        remember(context, "memory", task.client_state)
        reply.metrics["seconds"] = time.perf_counter() - started
        own = self._holding(context).test
        if len(own) and reply.state:
            model = self.builder.load(reply.state, shrunk(down.sizes, reply.kept), down.model)
            score = evaluate(model, own, self.options.eval_batch_size)
            reply.metrics |= {"own accuracy": score.accuracy, "own loss": score.loss}
        if down.up is not None:
            now = {**tensors(task.model), **reply.state}
            remember(context, "home", self._kept(down, context, {n: t for n, t in now.items() if n not in down.up}))
            reply.state = {name: t for name, t in reply.state.items() if name in down.up}
        if down.local:
            reply.state = drop_statistics(reply.state, self.builder.module(down.sizes, down.model))
        return self.desk.pack(reply, self._existing(down, reply))

    def _existing(self, down: Instruction, reply: Reply) -> Mapping[str, Tensor]:
        """The masks of what comes back: those sent, cut as the reply was, and the client's own over them."""
        if not reply.kept or not down.masks or down.sizes is None:
            return {**down.masks, **reply.masks}
        index = within(self.builder.widths, down.sizes, reply.kept)
        return {**{name: take(mask, index.get(name, {})) for name, mask in down.masks.items()}, **reply.masks}

    def passes(self, message: Message, context: Context) -> Reply:
        """Normalisation statistics of the sent submodel on this client's examples (spec heterofl 2.4)."""
        down, data = self._down(message), self._holding(context).train
        model = self._model(down, context)
        state, batches = measure_statistics(model, data.batches(self.options.eval_batch_size, None))
        return Reply(state, batches)

    def evaluate(self, message: Message, context: Context) -> dict[str, float]:
        down, holding = self._down(message), self._holding(context)
        if not len(holding.test):
            return {}
        labels, size = holding.labels if down.held else None, self.options.eval_batch_size
        model = self._model(down, context)
        if down.local:
            measure_statistics(model, holding.train.batches(size, None))
        score = evaluate(model, holding.test, size, labels)
        return {"accuracy": score.accuracy, "loss": score.loss, "examples": float(score.examples)}

    def _model(self, down: Instruction, context: Context) -> nn.Module:
        """The submodel with what was sent, and for the rest what the client has."""
        model = self.builder.module(down.sizes, down.model)
        state = {**initial_statistics(model), **down.state} if down.local else down.state
        missing = {name: tensor for name, tensor in tensors(model).items() if name not in state}
        return load_state(model, {**self._home(down, context, missing), **state})

    def _home(self, down: Instruction, context: Context, wanted: State) -> State:
        """The client's own tensors: as it left them if they still fit those `wanted`, else those of an untrained model."""
        kept = recall(context, "home") if wanted else {}
        found = {name: kept[name] for name, t in wanted.items() if name in kept and kept[name].shape == t.shape}
        if len(found) < len(wanted):
            initial = self.builder.initial(down.sizes, down.model)
            found = {name: found.get(name, initial[name]) for name in wanted}
        return {name: t * down.masks[name] if name in down.masks else t for name, t in found.items()}

    def _kept(self, down: Instruction, context: Context, trained: State) -> State:
        """What stays at home: entries outside the masks as they were."""
        before = recall(context, "home")
        return {
            name: torch.where(down.masks[name], t, before[name])
            if name in down.masks and name in before and before[name].shape == t.shape == down.masks[name].shape else t.clone()
            for name, t in trained.items()
        }  # fmt: skip

    def _down(self, message: Message) -> Instruction:
        payload = self.desk.open(message.content)
        assert isinstance(payload, Instruction)
        return payload

    def _holding(self, context: Context) -> ClientData:
        return self.federation.clients[client_id(context)]

    def _task(self, down: Instruction, context: Context) -> Task:
        full, public = self.builder.full, self.federation.public
        return Task(
            client=client_id(context), round=down.round, model=self._model(down, context),
            data=self._holding(context), options=self.options, plan_sizes=full if down.sizes is None else down.sizes,
            full_sizes=full, extras=down.extras, client_state=recall(context, "memory"), builder=self.builder,
            masks=dict(down.masks),
            public=None if public is None else public.tune, draws=self.builder.widths.draws,
        )  # fmt: skip


def shrunk(sizes: dict[str, int] | None, kept: Mapping[str, Tensor]) -> dict[str, int] | None:
    """`sizes` after a client went on with the units `kept`."""
    return {**sizes, **{name: len(units) for name, units in kept.items()}} if sizes and kept else sizes


def client_app(site: ClientRuntime) -> ClientApp:
    """The ClientApp of a run. Kinds of message: query (profile), train, train.passes (statistics), evaluate."""
    app = ClientApp()

    def answer(work: Callable[[Message, Context], object]) -> Callable[[Message, Context], Message]:
        return lambda message, context: Message(site.desk.seal(work(message, context)), reply_to=message)

    app.query()(answer(site.profile))
    app.train()(answer(site.train))
    app.train("passes")(answer(site.passes))
    app.evaluate()(answer(site.evaluate))
    return app


def client_id(context: Context) -> int:
    """A client is its partition; node ids are the engine's own affair."""
    return int(context.node_config["partition-id"])


def recall(context: Context, what: str) -> dict[str, Tensor]:
    """What the client remembers of earlier rounds: its plugins' "memory", and the tensors of its model that stay at "home"."""
    record = context.state.get(what)
    return record.to_torch_state_dict() if isinstance(record, ArrayRecord) else {}


def remember(context: Context, what: str, tensors: dict[str, Tensor]) -> None:
    if tensors or what in context.state:
        context.state[what] = ArrayRecord(tensors)
