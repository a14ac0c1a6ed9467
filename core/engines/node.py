"""The ClientApp of clients that Flower runs elsewhere, on Ray or on the nodes of a federation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Message, MessageType
from flwr.clientapp import ClientApp

from hetfl.engines.client_state import ClientStateStore
from hetfl.engines.faults import raised
from hetfl.engines.processes import app
from hetfl.errors import UsageError
from hetfl.rounds.client import client_id
from hetfl.rounds.records import RecordCodec

HELLO = f"{MessageType.QUERY}.hello"


@dataclass(frozen=True)
class NodeConfig:
    """What a node knows by itself: the text of the run's resolved config, the folder for its clients' memory, and what its
    node config says (JSON), where it is one of a federation."""

    config: str
    memory: Path
    node: str = ""


@functools.cache
def site(here: NodeConfig) -> ClientApp:
    """The run's own ClientApp, once a process."""
    torch.set_num_threads(1)
    if here.node:
        from hetfl.engines.flower import client_app as deployed

        return deployed.site(here.config, here.node)
    return app(here.config)


def client_app(where: Callable[[Context], NodeConfig], mods: list[Any] | None = None) -> ClientApp:
    """The ClientApp for clients elsewhere; `mods` are Flower's, around training."""
    outer = ClientApp()

    def answer(message: Message, context: Context) -> Message:
        try:
            return answered(where(context), message, context)
        except Exception as error:
            return raised(message, error)

    def hello(message: Message, context: Context) -> Message:
        count = float(str(context.node_config.get("num-partitions", 0)))
        return Message(RecordCodec().seal({"client": float(client_id(context)), "clients": count}), reply_to=message)

    outer.query("hello")(hello)
    outer.query()(answer)
    outer.train(mods=mods or [])(answer)
    outer.train("passes")(answer)
    outer.evaluate()(answer)
    return outer


def answered(here: NodeConfig, message: Message, context: Context) -> Message:
    """The run's answer, with the memory that the server counts on."""
    config = message.content.config_records["config"]
    round, before = int(str(config["round"])), int(str(config.get("remembers", 0)))
    if ":" in (model := str(config.get("model", ""))):
        raise UsageError(f"no module is imported because a message names it ('{model}')")
    memory = ClientStateStore(here.memory / str(client_id(context)))
    inner = Context(context.run_id, context.node_id, context.node_config, memory.load(before), context.run_config)
    reply = site(here)(message, inner)
    if message.metadata.message_type == MessageType.TRAIN and not reply.has_error():
        memory.save(round, before, inner.state)
    return reply
