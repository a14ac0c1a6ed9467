"""Clients in this process, on worker threads, or each in a process of its own that a thread waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hetfl.parallel import Pool
from hetfl.rounds.messages import Answer, ClientState, Content, Failure, Instruction, Kind


@dataclass(eq=False)
class Call:
    """A message for a client, and a copy of what it keeps: a client that fails has changed nothing."""

    kind: Kind
    client: int
    content: Content
    state: ClientState


class Job(Protocol):
    """Some calls for one worker; `cost` is the predicted work."""

    @property
    def calls(self) -> Sequence[Call]: ...
    @property
    def cost(self) -> float: ...


class Workers(Protocol):
    """Who answers: `split` deals calls out as jobs, `work` does one of these, in any thread."""

    def split(self, calls: Sequence[Call]) -> Sequence[Any]: ...
    def work(self, job: Any) -> list[Answer]: ...
    def close(self) -> None: ...


class LocalEngine:
    """`clients` clients, whose state lasts as long as the engine; nothing is encoded."""

    def __init__(self, workers: Workers, clients: int, pool: Pool, timeout: float | None = None) -> None:
        self._workers, self._pool, self._timeout = workers, pool, timeout
        self.notices: list[str] = []
        self._states: dict[int, ClientState] = {i: {} for i in range(clients)}
        self._before: dict[int, ClientState] = {}  # what clients that have trained in the round under way kept before it
        self._round = 0

    def ask(self, kind: Kind, contents: Mapping[int, Content]) -> Iterator[tuple[int, Answer]]:
        """The answers about in the order of `contents`; a Failure for a client that takes longer than the timeout."""

        def give_up(job: Job) -> list[Answer]:
            return [Failure(f"it gave no answer within {self._timeout:g} s") for _ in job.calls]

        round = max((c.round for c in contents.values() if isinstance(c, Instruction)), default=self._round)
        if round != self._round:
            self._before, self._round = {}, round
        jobs = self._workers.split([Call(kind, i, content, dict(self._states[i])) for i, content in contents.items()])
        answered = self._pool.imap_ordered(self._workers.work, jobs, lambda job: job.cost, self._timeout, give_up)
        for job, answers in zip(jobs, answered, strict=True):
            for call, answer in zip(job.calls, answers, strict=True):
                if not isinstance(answer, Failure):
                    if kind == "train":
                        self._before.setdefault(call.client, self._states[call.client])
                    self._states[call.client] = call.state
                yield call.client, answer

    def drive(self, work: Callable[[], None]) -> None:
        """Does `work`; there is nothing to begin or to end."""
        work()

    def client_states(self) -> dict[int, ClientState]:
        """What every client keeps."""
        return {client: dict(state) for client, state in self._states.items()}

    def restore_client_states(self, states: Mapping[int, ClientState]) -> None:
        """Gives clients back what `client_states` gave."""
        self._states |= {client: dict(state) for client, state in states.items()}

    def revert(self, client: int) -> None:
        """Gives a client back what it kept before this round's training."""
        if client in self._before:
            self._states[client] = self._before.pop(client)

    def close(self) -> None:
        """Ends the workers."""
        self._workers.close()
