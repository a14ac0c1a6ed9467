"""An in-process Flower Grid: messages go to a ClientApp on worker threads, with no server and no Ray.

This module alone uses names of Flower that are private (`PRIVATE`); Flower's version is bounded in pyproject.toml.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from hetfl.core.pool import Pool

PRIVATE = ("flwr.supercore.run.Run", "flwr.supercore.task_identity.TaskIdentity", "Metadata._message_id")
CLIENT_RAISED = 2
SERVER_NODE = 1


class LocalGrid(Grid):
    """`nodes` clients, each with a Context that lasts as long as the grid. Payloads travel by reference."""

    def __init__(self, app: ClientApp, nodes: int, pool: Pool) -> None:
        self._app, self._pool = app, pool
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, SERVER_NODE, 1
        self._run = Run.create_empty(1)
        self._contexts = {node(i): context(i, nodes) for i in range(nodes)}
        self._replies: dict[str, Message] = {}
        self._sent = 0

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        batch = list(messages)
        for message in batch:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = f"m{self._sent}"
        for reply in self._pool.map(self._deliver, batch):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [m.metadata.message_id for m in batch]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, message: Message) -> Message:
        try:
            return self._app(message, self._contexts[message.metadata.dst_node_id])
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            reason = "".join(traceback.format_exception(error))
            return Message(Error(CLIENT_RAISED, reason), reply_to=message)


def node(client: int) -> int:
    """The node that holds partition `client`; 0 and 1 are Flower's own."""
    return client + 2


def client(node: int) -> int:
    """The partition that a node of the local grid holds."""
    return node - 2


def context(client: int, clients: int) -> Context:
    config: dict[str, Any] = {"partition-id": client, "num-partitions": clients}
    return Context(run_id=1, node_id=node(client), node_config=config, state=RecordDict(), run_config={})


def by_request(messages: Sequence[Message], replies: Iterable[Message]) -> list[tuple[int, Message]]:
    """(client, reply) in client order, whatever the order of arrival; a client that did not answer is absent."""
    sent = {m.metadata.message_id: client(m.metadata.dst_node_id) for m in messages}
    known = [(sent[r.metadata.reply_to_message_id], r) for r in replies if r.metadata.reply_to_message_id in sent]
    return sorted(known, key=lambda pair: pair[0])
