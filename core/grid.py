"""An in-process Flower Grid: messages go to a ClientApp on worker threads, with no server and no Ray.

This module alone uses names of Flower that are private (`PRIVATE`); Flower's version is bounded in pyproject.toml.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from hetfl.core.pool import Pool

PRIVATE = ("flwr.supercore.run.Run", "flwr.supercore.task_identity.TaskIdentity", "Metadata._message_id")
SERVER_NODE = 1


class Workers(Protocol):
    """Who answers a round's messages: `jobs` deals them out, `work` does one of these, in any thread."""

    def jobs(self, calls: Sequence[tuple[Message, Context]]) -> Sequence[Any]: ...
    def work(self, job: Any) -> list[Message]: ...
    def close(self) -> None: ...


class LocalGrid(Grid):
    """`nodes` clients, each with a Context that lasts as long as the grid. Payloads travel by reference."""

    def __init__(self, crew: Workers, nodes: int, pool: Pool) -> None:
        self._crew, self._pool = crew, pool
        identify(SERVER_NODE)
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
        for reply in self.send_and_receive(batch):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [m.metadata.message_id for m in batch]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The replies as they come, about in the order of the messages."""
        calls = []
        for message in messages:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = f"m{self._sent}"
            calls.append((message, self._contexts[message.metadata.dst_node_id]))
        answered = self._pool.stream(self._crew.work, self._crew.jobs(calls), lambda job: job.cost)
        return itertools.chain.from_iterable(answered)

    def close(self) -> None:
        self._crew.close()


def identify(node: int) -> None:
    """Says who this process is; Flower wants to know before it makes a Message."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, node, 1


def node(client: int) -> int:
    """The node that holds partition `client`; 0 and 1 are Flower's own."""
    return client + 2


def client(node: int) -> int:
    """The partition that a node of the local grid holds."""
    return node - 2


def context(client: int, clients: int) -> Context:
    config: dict[str, Any] = {"partition-id": client, "num-partitions": clients}
    return Context(run_id=1, node_id=node(client), node_config=config, state=RecordDict(), run_config={})


def by_request(messages: Sequence[Message], replies: Iterable[Message]) -> Iterator[tuple[int, Message]]:
    """(client, reply) in client order, whatever the order of arrival, each as soon as it is its turn; a client that did not answer
    is absent."""
    clients = {m.metadata.message_id: client(m.metadata.dst_node_id) for m in messages}
    turns, waiting = iter(sorted(clients.values())), dict[int, Message]()
    turn = next(turns, None)
    for reply in replies:
        if (who := clients.pop(reply.metadata.reply_to_message_id, None)) is not None:
            waiting[who] = reply
        while turn in waiting:
            yield turn, waiting.pop(turn)
            turn = next(turns, None)
    yield from sorted(waiting.items(), key=lambda item: item[0])
