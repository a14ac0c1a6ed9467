"""The ClientApp of clients that Flower runs elsewhere, on Ray or on the nodes of a federation."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from hetfl.config import resolve
from hetfl.engines.flower.client_state import ClientStateStore
from hetfl.engines.flower.records import RecordCodec, add_next_profile
from hetfl.engines.flower.remote import HELLO, TYPES
from hetfl.errors import UsageError
from hetfl.rounds.client import ClientRuntime
from hetfl.rounds.messages import Content, Failure, Instruction, Kind
from hetfl.rounds.reporting import NoCallback
from hetfl.rounds.setup import build_setup

RAISED = 2  # Flower's code for an exception in a client


def make_client_app(
    find_runtime: Callable[[Context], ClientRuntime], find_folder: Callable[[Context], Path], mods: list[Any] | None = None
) -> ClientApp:
    """The ClientApp for clients elsewhere; `mods` are Flower's, around training.

    `find_runtime` gives what a client has at hand, `find_folder` the folder of the client states on this machine.
    """
    app, codec = ClientApp(), RecordCodec()

    def answer(kind: Kind, message: Message, context: Context) -> Message:
        try:
            content = codec.decode(message.content)
            refuse_modules(content)
            runtime, client = find_runtime(context), client_of(context)
            found = codec.encode(answer_on_node(kind, content, runtime, find_folder(context), client))
            if kind == "train" and isinstance(content, Instruction) and content.round < runtime.options.rounds:
                say_profile(found, lambda: runtime, client, content.round + 1)
            return Message(found, reply_to=message)
        except (Exception, SystemExit) as error:
            return Message(Error(RAISED, Failure.of(error).text), reply_to=message)

    def introduce(message: Message, context: Context) -> Message:
        client, count = client_of(context), float(str(context.node_config.get("num-partitions", 0)))
        found = codec.encode({"client": float(client), "clients": count})
        say_profile(found, lambda: find_runtime(context), client, codec.decode(message.content))
        return Message(found, reply_to=message)

    app.query(HELLO.partition(".")[2])(introduce)
    app.query()(partial(answer, "profile"))
    app.train(mods=mods or [])(partial(answer, "train"))
    app.train(TYPES["statistics"].partition(".")[2])(partial(answer, "statistics"))
    app.evaluate()(partial(answer, "evaluate"))
    return app


def say_profile(content: RecordDict, find_runtime: Callable[[], ClientRuntime], client: int, round: int) -> None:
    """Has a message say what its client affords in the coming `round`; nothing where that fails: why is said when it is asked."""
    with suppress(Exception, SystemExit):
        add_next_profile(content, round, find_runtime().profile(client, round))


def refuse_modules(content: Content) -> None:
    """Raises UsageError for a message that names a module to import."""
    if isinstance(content, Instruction) and content.model and ":" in content.model:
        raise UsageError(f"no module is imported because a message names it ('{content.model}')")


def answer_on_node(kind: Kind, content: Content, runtime: ClientRuntime, folder: Path, client: int) -> Any:
    """The client's answer, with the state that the server counts on; what training leaves is kept on this disk."""
    if not isinstance(content, Instruction):
        return runtime.answer(kind, client, content, {})
    store = ClientStateStore(folder / str(client), runtime.options.checkpoint_every, runtime.options.keep_checkpoints)
    state = store.load(content.state_version)
    found = runtime.answer(kind, client, content, state)
    if kind == "train":
        store.save(content.round, content.state_version, state)
    return found


def client_of(context: Context) -> int:
    """A client is its partition; node ids are Flower's own."""
    return int(str(context.node_config["partition-id"]))


@functools.cache
def build_runtime(config: str) -> ClientRuntime:
    """The client runtime of the run that `config` resolves, once a process."""
    torch.set_num_threads(1)
    return build_setup(resolve(tomllib.loads(config)), NoCallback()).runtime(RecordCodec().pack)
