"""Clients on any Flower grid: on Ray or on the nodes of a federation, each node known by the partition that it holds."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from hetfl.engines.flower.fetching import Fetcher
from hetfl.engines.flower.records import MalformedError, RecordCodec, count_bytes, read_next_profile
from hetfl.errors import RunError
from hetfl.profiling.node import Profile
from hetfl.rounds.messages import MOST_TEXT, Answer, ClientState, Content, Failure, Kind, too_long

TYPES = {
    "profile": MessageType.QUERY, "train": MessageType.TRAIN, "statistics": f"{MessageType.TRAIN}.statistics",
    "evaluate": MessageType.EVALUATE,
}  # fmt: skip
HELLO = f"{MessageType.QUERY}.hello"
PATIENCE = 3600.0  # seconds for an answer where the run sets no timeout
GREETING = 300.0  # … for the answer to a hello, with which a node loads its data
LEAST_PAUSE, MOST_PAUSE = 0.2, 3.0  # seconds between two looks for answers


@dataclass(frozen=True, eq=False)
class Call:
    """A message that a client has been sent, and until when its answer is waited for."""

    client: int
    content: Content
    until: float


@dataclass(eq=False)
class Outbox:
    """Calls that wait for their answers, by the messages' ids, and answers that wait for nothing."""

    calls: dict[str, Call] = field(default_factory=dict)
    failures: list[tuple[int, Answer]] = field(default_factory=list)


def find_pause(began: float) -> float:
    """Seconds until the next look for answers that have been waited for since `began`: a twentieth of that."""
    return min(max(LEAST_PAUSE, (time.monotonic() - began) / 20), MOST_PAUSE)


def pack_key(key: bytes) -> bytes:
    """A public key, in PEM or OpenSSH's form, in one form; b"" for what is none."""
    for load in (serialization.load_pem_public_key, serialization.load_ssh_public_key):
        with suppress(ValueError, UnsupportedAlgorithm):
            return load(key).public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return b""


class FlowerEngine:
    """Asks clients through Flower messages; nodes may join and leave.

    A node says once, in a query, which client it is: node ids are Flower's own. `keys` (client -> public key in OpenSSH's form)
    says whose key a client's node has; where it says nothing, a client is the first connected node that claims it. With that first
    answer, and with every reply to training, comes what the client affords in the round after, so that it is not asked for it;
    `first` is the round that begins. With `any_round` what it said last does for any, so that nobody waits for one that hangs.
    """

    def __init__(
        self, clients: int, timeout: float | None, wait: float, keys: Mapping[int, str] | None = None, first: int = 1,
        any_round: bool = False,
    ) -> None:  # fmt: skip
        self.notices: list[str] = []
        self._keys = {client: pack_key(key.encode()) for client, key in (keys or {}).items()}
        self._clients, self._timeout, self._wait, self._first, self._any_round = clients, timeout, wait, first, any_round
        self._grid: Grid | None = None
        self._claims: dict[int, int] = {}  # node -> the client that it says it is, the first to say so first
        self._greeted: dict[str, tuple[int, float]] = {}  # a hello under way -> its node, and until when it is waited for
        self._profiles: dict[int, tuple[int, Profile]] = {}  # node -> a round, and what it affords in it
        self._ignored: set[int] = set()  # nodes of which it has been said
        self._codec, self._sent = RecordCodec(), Outbox()

    def attach(self, grid: Grid) -> None:
        """Takes the grid that Flower gives, and waits until its clients are there. Raises RunError where none comes."""
        self._use(grid)
        if not self._await_nodes(self._clients):
            raise RunError(f"no node has joined within {self._wait:g} s{''.join(f'; {n}' for n in self.notices)}")

    def _await_nodes(self, count: int) -> dict[int, int]:
        """The nodes that are connected, once there are so many or the wait is over."""
        until = time.monotonic() + self._wait
        while len(nodes := self._find_nodes()) < count and (self._greeted or time.monotonic() < until):
            time.sleep(LEAST_PAUSE)
        return nodes

    def _use(self, grid: Grid) -> None:
        """Takes a grid."""
        self._grid, self._fetcher = grid, Fetcher(grid)

    def _find_nodes(self) -> dict[int, int]:
        """The node of every client that is connected now: the first that claims it and may be it."""
        assert self._grid is not None
        found = {node.node_id: node.public_key for node in self._grid.get_nodes()}
        self._claims = {node: client for node, client in self._claims.items() if node in found}
        self._greet(self._grid, found)
        nodes = dict[int, int]()
        for node, client in self._claims.items():
            if client in self._keys and self._keys[client] != pack_key(found[node]):
                self._ignore(node, "its key is not the one of this client")
            elif client in nodes:
                self._ignore(node, "another node is this client")
            else:
                nodes[client] = node
        return dict(sorted(nodes.items()))

    def _greet(self, grid: Grid, connected: Collection[int]) -> None:
        """Asks nodes that are new which client they are, and hears those that have answered since."""
        now = time.monotonic()
        self._greeted = {id: (node, until) for id, (node, until) in self._greeted.items() if node in connected and now < until}
        known = self._claims.keys() | {node for node, _ in self._greeted.values()}
        hellos = [
            Message(self._codec.encode(self._first), node, HELLO, group_id="hello")
            for node in sorted(connected)
            if node not in known
        ]
        pushed = set(grid.push_messages(hellos)) if hellos else set()
        self._greeted |= {
            m.metadata.message_id: (m.metadata.dst_node_id, now + GREETING) for m in hellos if m.metadata.message_id in pushed
        }
        for reply in self._fetcher.look(list(self._greeted)):
            node, _ = self._greeted.pop(reply.metadata.reply_to_message_id)
            if (client := self._read_client_id(reply)) in range(self._clients):
                self._claims[node] = client
                self._note_profile(node, reply)

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

    def _note_profile(self, node: int, reply: Message) -> None:
        """Notes what a node says unasked of what it affords in the round to come."""
        if reply.has_content() and (said := read_next_profile(reply.content)) is not None:
            self._profiles[node] = said

    def ask(self, kind: Kind, contents: Mapping[int, Content]) -> Iterator[tuple[int, Answer]]:
        """The answers; a Failure for a client whose node is not there, or gives none in time."""
        began, outbox = time.monotonic(), Outbox()
        yield from self._send(outbox, kind, contents)
        while True:
            yield from self._collect(outbox)
            if not outbox.calls:
                return
            time.sleep(find_pause(began))

    def send(self, kind: Kind, contents: Mapping[int, Content]) -> None:
        """Asks without waiting: `collect` gives the answers."""
        self._sent.failures += self._send(self._sent, kind, contents)

    def collect(self) -> Iterator[tuple[int, Answer]]:
        """The answers that have come to what was sent."""
        failures, self._sent.failures = self._sent.failures, []
        yield from failures
        yield from self._collect(self._sent)

    def _send(self, outbox: Outbox, kind: Kind, contents: Mapping[int, Content]) -> list[tuple[int, Answer]]:
        """Sends the messages; returns the answers that are known without one.

        Raises RunError where no node is there and none comes back: all rounds that are left would be over at once, without anybody.
        """
        assert self._grid is not None
        nodes = self._find_nodes() or self._await_nodes(1)
        if not nodes:
            raise RunError(f"no node is connected any more, and none came back within {self._wait:g} s; go on with hfl resume")
        until = time.monotonic() + (self._timeout or PATIENCE)
        known: dict[int, Answer] = {i: Failure("its node is not connected") for i in contents if i not in nodes}
        if kind == "profile":
            said = {i: self._profiles.get(nodes[i]) for i in contents if i in nodes}
            known |= {i: found[1] for i, found in said.items() if found and (self._any_round or found[0] == contents[i])}
        messages = {i: self._message(kind, nodes[i], content) for i, content in contents.items() if i not in known}
        pushed = set(self._grid.push_messages(list(messages.values()))) if messages else set()
        for client, message in messages.items():
            if (id := message.metadata.message_id) in pushed:
                outbox.calls[id] = Call(client, contents[client], until)
            else:
                known[client] = Failure("Flower did not take the message for it")
        return list(known.items())

    def _collect(self, outbox: Outbox) -> Iterator[tuple[int, Answer]]:
        """The answers that have come, and a Failure for each that has been waited for long enough."""
        for reply in self._fetcher.look(list(outbox.calls)):
            if (call := outbox.calls.pop(reply.metadata.reply_to_message_id, None)) is not None:
                self._note_profile(reply.metadata.src_node_id, reply)
                yield call.client, self._read(reply, call.content)
        late = [id for id, call in outbox.calls.items() if time.monotonic() > call.until]
        self._fetcher.forget(late)
        for call in map(outbox.calls.pop, late):
            yield call.client, Failure(f"it gave no answer within {self._timeout or PATIENCE:g} s")

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
