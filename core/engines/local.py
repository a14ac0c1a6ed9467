"""An in-process Flower Grid: messages go to a ClientApp on worker threads, with no server and no Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid

from hetfl.engines.faults import LATE
from hetfl.engines.flower_internals import Run, identify, number
from hetfl.parallel import Pool

SERVER_NODE = 1

Call = tuple[Message, Context]


class Job(Protocol):
    """Some messages for one worker, with the contexts of their clients; `cost` is the predicted work."""

    @property
    def calls(self) -> Sequence[Call]: ...
    @property
    def cost(self) -> float: ...


class Workers(Protocol):
    """Who answers a round's messages: `jobs` deals them out, `work` does one of these, in any thread."""

    def jobs(self, calls: Sequence[Call]) -> Sequence[Any]: ...
    def work(self, job: Any) -> list[Message]: ...
    def close(self) -> None: ...


class LocalGrid(Grid):
    """`nodes` clients, each with a Context that lasts as long as the grid. Payloads travel by reference."""

    def __init__(self, crew: Workers, nodes: int, pool: Pool, timeout: float | None = None) -> None:
        self._crew, self._pool, self._timeout = crew, pool, timeout
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
        """The replies as they come, about in the order of the messages; an error for a client that takes longer than the timeout.

        A client works on a copy of its context: what it remembers counts once its reply is there.
        """
        calls, limit = [], timeout or self._timeout
        for message in messages:
            self._sent += 1
            number(message, f"m{self._sent}")
            calls.append((message, copied(self._contexts[message.metadata.dst_node_id])))
        return self._answers(self._crew.jobs(calls), limit)

    def _answers(self, jobs: Sequence[Job], limit: float | None) -> Iterator[Message]:
        def late(job: Job) -> list[Message]:
            return [Message(Error(LATE, f"it gave no answer within {limit:g} s"), reply_to=message) for message, _ in job.calls]

        for job, replies in zip(
            jobs, self._pool.imap_ordered(self._crew.work, jobs, lambda job: job.cost, limit, late), strict=True
        ):
            for (message, context), reply in zip(job.calls, replies, strict=True):
                if not reply.has_error():
                    self._contexts[message.metadata.dst_node_id].state = context.state
                yield reply

    def contexts(self) -> dict[int, Context]:
        """What every client remembers."""
        return {client(node): context for node, context in self._contexts.items()}

    def drive(self, work: Callable[[], Any]) -> None:
        """Does the run's `work`; there is nothing to begin or to end."""
        work()

    def close(self) -> None:
        self._crew.close()


def node(client: int) -> int:
    """The node that holds partition `client`; 0 and 1 are Flower's own."""
    return client + 2


def client(node: int) -> int:
    """The partition that a node of the local grid holds."""
    return node - 2


def context(client: int, clients: int) -> Context:
    config: dict[str, Any] = {"partition-id": client, "num-partitions": clients}
    return Context(run_id=1, node_id=node(client), node_config=config, state=RecordDict(), run_config={})


def copied(of: Context) -> Context:
    """A context that can be changed without the other noticing; records are replaced, never written to."""
    return Context(of.run_id, of.node_id, of.node_config, RecordDict(dict(of.state.items())), of.run_config)


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
