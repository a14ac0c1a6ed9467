"""The server's side of clients that Flower runs elsewhere: any Flower grid, its nodes known by their partition."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import Context, Error, Message
from flwr.serverapp import Grid

from hetfl.engines import local
from hetfl.engines.faults import UNAVAILABLE
from hetfl.engines.flower_internals import number
from hetfl.engines.node import HELLO
from hetfl.errors import RunError
from hetfl.rounds.records import MalformedError, RecordCodec

PATIENCE = 3600.0  # seconds for an answer where the run sets no timeout

GREETING = 60.0  # … for the answer to a hello


class RemoteGrid:
    """Any Flower grid, its nodes known by the partition that they hold; they may join and leave.

    A node says once, in a query, which client it is: node ids are Flower's own.
    """

    def __init__(self, clients: int, timeout: float | None, wait: float) -> None:
        self._clients, self._timeout, self._wait = clients, timeout, wait
        self._grid: Grid | None = None
        self._homes: dict[int, int] = {}  # node -> client
        self._count = 0

    def attach(self, grid: Grid) -> None:
        """Takes the grid that Flower gives, and waits until its clients are there. Raises RunError where none comes."""
        self._grid, until = grid, time.monotonic() + self._wait
        while len(self._places()) < self._clients and time.monotonic() < until:
            time.sleep(0.2)
        if not self._homes:
            raise RunError(f"no node has joined within {self._wait:g} s")

    def _places(self) -> dict[int, int]:
        """The node of every client that is connected now."""
        assert self._grid is not None
        nodes = set(self._grid.get_node_ids())
        self._homes = {node: client for node, client in self._homes.items() if node in nodes}
        asked = [Message(RecordCodec().seal(0), node, HELLO, group_id="hello") for node in sorted(nodes - self._homes.keys())]
        for reply in self._grid.send_and_receive(asked, timeout=GREETING) if asked else []:
            if (client := introduced(reply)) is not None and client in range(self._clients):
                self._homes[reply.metadata.src_node_id] = client
        return {client: node for node, client in sorted(self._homes.items())}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The replies; an error for a client whose node is not there."""
        assert self._grid is not None
        places, there, replies = self._places(), [], list[Message]()
        for message in messages:
            if (node := places.get(local.client(message.metadata.dst_node_id))) is None:
                self._count += 1
                number(message, f"absent-{self._count}")
                replies.append(Message(Error(UNAVAILABLE, "its node is not connected"), reply_to=message))
            else:
                meta = message.metadata
                there.append((message, Message(message.content, node, meta.message_type, group_id=meta.group_id)))
        found = (
            list(self._grid.send_and_receive([m for _, m in there], timeout=timeout or self._timeout or PATIENCE)) if there else []
        )
        for message, sent in there:
            number(message, sent.metadata.message_id)
        return iter([*replies, *found])

    def drive(self, work: Callable[[], Any]) -> None:
        """Does the run's `work` where Flower has given the grid."""
        work()

    def contexts(self) -> dict[int, Context]:
        """None: clients remember on their own disks."""
        return {}

    def close(self) -> None:
        """Flower's own affair."""


def introduced(reply: Message) -> int | None:
    """Which client a node says it is; None where it says nothing that can be understood."""
    try:
        return int(RecordCodec().open(reply.content)["client"]) if reply.has_content() else None
    except (MalformedError, LookupError, TypeError, ValueError, OverflowError):
        return None
