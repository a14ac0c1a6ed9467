"""Clients on any Flower grid: on Ray or on the nodes of a federation, each node known by the partition that it holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from hetfl.engines.flower.records import MalformedError, RecordCodec
from hetfl.errors import RunError
from hetfl.rounds.messages import Answer, ClientState, Content, Failure, Kind

TYPES = {
    "profile": MessageType.QUERY, "train": MessageType.TRAIN, "statistics": f"{MessageType.TRAIN}.statistics",
    "evaluate": MessageType.EVALUATE,
}  # fmt: skip
HELLO = f"{MessageType.QUERY}.hello"
PATIENCE = 3600.0  # seconds for an answer where the run sets no timeout
GREETING = 60.0  # … for the answer to a hello


class FlowerEngine:
    """Asks clients through Flower messages; nodes may join and leave.

    A node says once, in a query, which client it is: node ids are Flower's own.
    """

    def __init__(self, clients: int, timeout: float | None, wait: float) -> None:
        self._clients, self._timeout, self._wait = clients, timeout, wait
        self._grid: Grid | None = None
        self._client_of: dict[int, int] = {}  # node -> client
        self._codec = RecordCodec()

    def attach(self, grid: Grid) -> None:
        """Takes the grid that Flower gives, and waits until its clients are there. Raises RunError where none comes."""
        self._grid, until = grid, time.monotonic() + self._wait
        while len(self._find_nodes(grid)) < self._clients and time.monotonic() < until:
            time.sleep(0.2)
        if not self._client_of:
            raise RunError(f"no node has joined within {self._wait:g} s")

    def _find_nodes(self, grid: Grid) -> dict[int, int]:
        """The node of every client that is connected now."""
        nodes = set(grid.get_node_ids())
        self._client_of = {node: client for node, client in self._client_of.items() if node in nodes}
        new = sorted(nodes - self._client_of.keys())
        asked = [Message(self._codec.encode(0), node, HELLO, group_id="hello") for node in new]
        for reply in grid.send_and_receive(asked, timeout=GREETING) if asked else []:
            if (client := self._read_client_id(reply)) in range(self._clients):
                self._client_of[reply.metadata.src_node_id] = client
        return {client: node for node, client in sorted(self._client_of.items())}

    def _read_client_id(self, reply: Message) -> int:
        """Which client a node says it is; -1 where it says nothing that can be understood."""
        try:
            return int(self._codec.decode(reply.content)["client"]) if reply.has_content() else -1
        except (MalformedError, LookupError, TypeError, ValueError, OverflowError):
            return -1

    def ask(self, kind: Kind, contents: Mapping[int, Content]) -> Iterator[tuple[int, Answer]]:
        """The answers; a Failure for a client whose node is not there."""
        assert self._grid is not None
        nodes = self._find_nodes(self._grid)
        yield from ((i, Failure("its node is not connected")) for i in contents if i not in nodes)
        sent = {i: self._message(kind, nodes[i], content) for i, content in contents.items() if i in nodes}
        replies = self._grid.send_and_receive(list(sent.values()), timeout=self._timeout or PATIENCE) if sent else []
        replies, clients = list(replies), {message.metadata.message_id: i for i, message in sent.items()}
        for reply in replies:
            if (client := clients.get(reply.metadata.reply_to_message_id)) is not None:
                yield client, self._read(reply)

    def _message(self, kind: Kind, node: int, content: Content) -> Message:
        round = content if isinstance(content, int) else content.round
        return Message(self._codec.encode(content), node, TYPES[kind], group_id=str(round))

    def _read(self, reply: Message) -> Answer:
        """The answer in a message; a Failure where it is an error or cannot be read."""
        if reply.has_error():
            return Failure(reply.error.reason or "")
        try:
            return self._codec.decode(reply.content)  # type: ignore[no-any-return]
        except MalformedError as error:
            return Failure(str(error))

    def drive(self, work: Callable[[], None]) -> None:
        """Does `work` where Flower has given the grid."""
        work()

    def client_states(self) -> dict[int, ClientState]:
        """Nothing: clients keep their state on their own disks."""
        return {}

    def restore_client_states(self, states: Mapping[int, ClientState]) -> None:
        """Nothing: an instruction says which version of its state a client is to go on from."""

    def close(self) -> None:
        """Flower ends what it began."""
