"""Clients on any Flower grid: on Ray or on the nodes of a federation, each node known by the partition that it holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from hetfl.engines.flower.records import MalformedError, RecordCodec, count_bytes
from hetfl.errors import RunError
from hetfl.rounds.messages import MOST_TEXT, Answer, ClientState, Content, Failure, Kind, too_long

TYPES = {
    "profile": MessageType.QUERY, "train": MessageType.TRAIN, "statistics": f"{MessageType.TRAIN}.statistics",
    "evaluate": MessageType.EVALUATE,
}  # fmt: skip
HELLO = f"{MessageType.QUERY}.hello"
PATIENCE = 3600.0  # seconds for an answer where the run sets no timeout
GREETING = 60.0  # … for the answer to a hello


def pack_key(key: bytes) -> bytes:
    """A public key, in PEM or OpenSSH's form, in one form; b"" for what is none."""
    for load in (serialization.load_pem_public_key, serialization.load_ssh_public_key):
        with suppress(ValueError, UnsupportedAlgorithm):
            return load(key).public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return b""


class FlowerEngine:
    """Asks clients through Flower messages; nodes may join and leave.

    A node says once, in a query, which client it is: node ids are Flower's own. `keys` (client -> public key in OpenSSH's form)
    says whose key a client's node has; where it says nothing, a client is the first connected node that claims it.
    """

    def __init__(self, clients: int, timeout: float | None, wait: float, keys: Mapping[int, str] | None = None) -> None:
        self.notices: list[str] = []
        self._keys = {client: pack_key(key.encode()) for client, key in (keys or {}).items()}
        self._clients, self._timeout, self._wait = clients, timeout, wait
        self._grid: Grid | None = None
        self._claims: dict[int, int] = {}  # node -> the client that it says it is, the first to say so first
        self._ignored: set[int] = set()  # nodes of which it has been said
        self._codec = RecordCodec()

    def attach(self, grid: Grid) -> None:
        """Takes the grid that Flower gives, and waits until its clients are there. Raises RunError where none comes."""
        self._grid, until = grid, time.monotonic() + self._wait
        while len(self._find_nodes(grid)) < self._clients and time.monotonic() < until:
            time.sleep(0.2)
        if not self._find_nodes(grid):
            raise RunError(f"no node has joined within {self._wait:g} s{''.join(f'; {n}' for n in self.notices)}")

    def _find_nodes(self, grid: Grid) -> dict[int, int]:
        """The node of every client that is connected now: the first that claims it and may be it."""
        found = {node.node_id: node.public_key for node in grid.get_nodes()}
        self._claims = {node: client for node, client in self._claims.items() if node in found}
        asked = [
            Message(self._codec.encode(0), node, HELLO, group_id="hello") for node in sorted(found.keys() - self._claims.keys())
        ]
        for reply in grid.send_and_receive(asked, timeout=GREETING) if asked else []:
            if (client := self._read_client_id(reply)) in range(self._clients):
                self._claims[reply.metadata.src_node_id] = client
        nodes = dict[int, int]()
        for node, client in self._claims.items():
            if client in self._keys and self._keys[client] != pack_key(found[node]):
                self._ignore(node, "its key is not the one of this client")
            elif client in nodes:
                self._ignore(node, "another node is this client")
            else:
                nodes[client] = node
        return dict(sorted(nodes.items()))

    def _ignore(self, node: int, why: str) -> None:
        """Says once that a node is not heard."""
        if node not in self._ignored:
            self._ignored.add(node)
            self.notices.append(f"a node that claims to be client {self._claims[node]} is not heard: {why}")

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
                yield client, self._read(reply, contents[client])

    def _message(self, kind: Kind, node: int, content: Content) -> Message:
        round = content if isinstance(content, int) else content.round
        return Message(self._codec.encode(content), node, TYPES[kind], group_id=str(round))

    def _read(self, reply: Message, content: Content) -> Answer:
        """The answer to `content` in a message; a Failure where it is an error, too long or cannot be read."""
        if reply.has_error():
            return Failure((reply.error.reason or "")[-MOST_TEXT:])
        if (failure := too_long(count_bytes(reply.content), content)) is not None:
            return failure
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

    def revert(self, client: int) -> None:
        """Nothing: the next instruction names the version before."""

    def close(self) -> None:
        """Flower ends what it began."""
