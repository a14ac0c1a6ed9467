"""The engine of one machine: clients on worker threads, or each in a process of its own that a thread waits for.

Worker threads take small clients several at a time, and train equal shapes as one model (vmap).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from hetfl.models.state import tensors
from hetfl.parallel import Pool
from hetfl.rounds.client import ClientRuntime
from hetfl.rounds.messages import Answer, ClientState, Content, Failure, Instruction, Kind
from hetfl.training import vectorized
from hetfl.training.stacking import NotStackableError

SLIGHT = 1e7  # parameters x examples up to which several clients share a job
JOBS_PER_WORKER = 8  # that a worker gets at least, where there are enough clients


@dataclass(eq=False)
class Call:
    """A message for a client, and a copy of what it keeps: a client that fails has changed nothing."""

    kind: Kind
    client: int
    content: Content
    state: ClientState

    @property
    def entries(self) -> int:
        """Entries of the tensors that it sends."""
        return sum(t.numel() for t in self.content.state.values()) if isinstance(self.content, Instruction) else 0


@dataclass(frozen=True, eq=False)
class Job:
    """Some calls for one worker, in client order, and their predicted `cost`; with `group`, they train as one batched model."""

    calls: list[Call]
    cost: float
    group: bool = False


class Workers(Protocol):
    """Who answers: `split` deals calls out as jobs, `work` does one of these, in any thread; `notices` are still to be said."""

    notices: list[str]

    def split(self, calls: Sequence[Call]) -> Sequence[Job]: ...
    def work(self, job: Job) -> list[Answer]: ...
    def close(self) -> None: ...


class KeepingEngine:
    """Has what `clients` clients keep between rounds, as long as it lasts, and gives it to whoever answers."""

    def __init__(self, clients: int) -> None:
        self.notices: list[str] = []
        self._states: dict[int, ClientState] = {i: {} for i in range(clients)}
        self._before: dict[int, ClientState] = {}  # what clients that have trained in the round under way kept before it
        self._round = 0

    def answers(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Answer]]:
        """Every call with its answer, about in the order of `calls`; what the client keeps is then in the call's state."""
        raise NotImplementedError

    def ask(self, kind: Kind, contents: Mapping[int, Content]) -> Iterator[tuple[int, Answer]]:
        """The answers about in the order of `contents`."""
        round = max((c.round for c in contents.values() if isinstance(c, Instruction)), default=self._round)
        if round != self._round:
            self._before, self._round = {}, round
        for call, answer in self.answers([Call(kind, i, content, dict(self._states[i])) for i, content in contents.items()]):
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


class LocalEngine(KeepingEngine):
    """Clients on the threads of `pool`; nothing is encoded. A Failure for a client that takes longer than the timeout."""

    def __init__(self, workers: Workers, clients: int, pool: Pool, timeout: float | None = None) -> None:
        super().__init__(clients)
        self._workers, self._pool, self._timeout, self.notices = workers, pool, timeout, workers.notices

    def answers(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Answer]]:
        """Every call with its answer, in the order of the jobs."""

        def give_up(job: Job) -> list[Answer]:
            return [Failure(f"it gave no answer within {self._timeout:g} s") for _ in job.calls]

        jobs = self._workers.split(calls)
        answered = self._pool.imap_ordered(self._workers.work, jobs, lambda job: job.cost, self._timeout, give_up)
        for job, answers in zip(jobs, answered, strict=True):
            yield from zip(job.calls, answers, strict=True)

    def close(self) -> None:
        """Ends the workers."""
        self._workers.close()


class ThreadWorkers:
    """Answers for all clients of one process; `group_size` is how many clients may train as one."""

    def __init__(self, runtime: ClientRuntime, workers: int, group_size: int = 1) -> None:
        self._runtime, self._workers, self._group_size, self.notices = runtime, workers, group_size, list[str]()
        self._slight = SLIGHT if runtime.options.timeout is None else 0.0  # a client that may be given up has a job of its own
        self._examples = runtime.federation.train_sizes
        # of submodels by their sizes: tensors, and whether they may be padded
        self._forms: dict[tuple[tuple[str, int], ...], tuple[frozenset[str], bool]] = {}

    def split(self, calls: Sequence[Call]) -> list[Job]:
        """The jobs, in the order of the first client of each; the split never changes a result."""
        alone, groups = list[Call](), dict[object, list[Call]]()
        for call in calls:
            shape = self._shape(call)
            alone.append(call) if shape is None else groups.setdefault(shape, []).append(call)
        size = self._group_size
        together = [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
        return self._batch(alone) + [Job(group, sum(map(self._cost, group)), group=True) for group in together]

    def _batch(self, calls: list[Call]) -> list[Job]:
        """Jobs of one client each, or of several where these are slight."""
        most, jobs = max(1, len(calls) // (self._workers * JOBS_PER_WORKER)), list[Job]()
        for call in calls:
            cost = self._cost(call)
            if jobs and len(jobs[-1].calls) < most and jobs[-1].cost + cost <= self._slight:
                jobs[-1] = Job([*jobs[-1].calls, call], jobs[-1].cost + cost)
            else:
                jobs.append(Job([call], cost))
        return jobs

    def _cost(self, call: Call) -> float:
        """Predicted work: parameters times examples."""
        return float(self._examples[call.client] * call.entries)

    def _shape(self, call: Call) -> object:
        """What clients of one vmap group have in common; None for a client that trains by itself."""
        sent = call.content
        if self._group_size < 2 or call.kind != "train" or not isinstance(sent, Instruction):
            return None
        if sent.model or sent.masks or sent.local or sent.up is not None or sent.sizes is None or sent.steps:
            return None
        shape = tuple(sent.sizes.items())
        if shape not in self._forms:
            model = self._runtime.builder.module(sent.sizes)
            self._forms[shape] = frozenset(tensors(model)), vectorized.allows_padding(model)
        names, padded = self._forms[shape]
        return (shape, None if padded else self._examples[call.client]) if sent.state.keys() >= names else None

    def work(self, job: Job) -> list[Answer]:
        """The answers of a job, in its clients' order; a Failure for a client that raises.

        A group that fails trains client by client, with a notice where these do not fail.
        """
        why = None
        if job.group:
            try:
                sent = [call.content for call in job.calls if isinstance(call.content, Instruction)]
                return [*self._runtime.train_group([c.client for c in job.calls], sent, [c.state for c in job.calls])]
            except NotStackableError:
                pass
            except Exception as error:  # it goes, and what its frames hold of the group, before the clients train
                why = Failure.of(error).reason
        answers = [self._answer(call) for call in job.calls]
        if why is not None and not any(isinstance(answer, Failure) for answer in answers):
            who = ", ".join(str(call.client) for call in job.calls)
            self.notices.append(f"clients of one shape could not train as one and trained one by one ({who}): {why}")
        return answers

    def _answer(self, call: Call) -> Answer:
        try:
            return self._runtime.answer(call.kind, call.client, call.content, call.state)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return Failure.of(error)

    def close(self) -> None:
        """Nothing is kept that outlives the threads."""
