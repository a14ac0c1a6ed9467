"""Batches small clients into jobs, groups equal shapes for vmap, and answers them on worker threads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hetfl.engines.local import Call
from hetfl.models.state import tensors
from hetfl.rounds.client import ClientRuntime
from hetfl.rounds.messages import Answer, Failure, Instruction
from hetfl.training import vectorized

SLIGHT = 1e7  # parameters x examples up to which several clients share a job
JOBS_PER_WORKER = 8  # that a worker gets at least, where there are enough clients


@dataclass(frozen=True, eq=False)
class Job:
    """Some calls for one worker, in client order; with `group`, their clients train as one batched model."""

    calls: list[Call]
    cost: float
    group: bool = False


class ThreadWorkers:
    """Answers for all clients of one process; `group_size` is how many clients may train as one."""

    def __init__(self, runtime: ClientRuntime, workers: int, group_size: int = 1) -> None:
        self._runtime, self._workers, self._group_size = runtime, workers, group_size
        self._slight = SLIGHT if runtime.options.timeout is None else 0.0  # a client that may be given up has a job of its own

    def split(self, calls: Sequence[Call]) -> list[Job]:
        """The jobs, in the order of the first client of each; the split never changes a result."""
        alone, groups, known = [], dict[object, list[Call]](), dict[int, tuple[int, ...] | None]()
        for call in calls:
            shape = self._shape(call, known)
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
        if not isinstance(call.content, Instruction):
            return 0.0
        examples = len(self._runtime.federation.clients[call.client].train)
        return float(examples * sum(t.numel() for t in call.content.state.values()))

    def _shape(self, call: Call, known: dict[int, tuple[int, ...] | None]) -> object:
        """What clients of one vmap group have in common; None for a client that trains by itself. `known`: of states seen."""
        sent = call.content
        if self._group_size < 2 or call.kind != "train" or not isinstance(sent, Instruction):
            return None
        if sent.model or sent.masks or sent.local or sent.up is not None or sent.sizes is None or sent.steps:
            return None
        if id(sent.state) not in known:
            model = self._runtime.builder.module(sent.sizes)
            whole = sent.state.keys() >= tensors(model).keys()
            known[id(sent.state)] = (*sent.sizes.values(), vectorized.allows_padding(model)) if whole else None
        shape = known[id(sent.state)]
        return shape and (shape, None if shape[-1] else len(self._runtime.federation.clients[call.client].train))

    def work(self, job: Job) -> list[Answer]:
        """The answers of a job, in its clients' order; a Failure for a client that raises."""
        if job.group:
            try:
                sent = [call.content for call in job.calls if isinstance(call.content, Instruction)]
                return [*self._runtime.train_group([call.client for call in job.calls], sent)]
            except Exception:
                pass
        return [self._answer(call) for call in job.calls]

    def _answer(self, call: Call) -> Answer:
        try:
            return self._runtime.answer(call.kind, call.client, call.content, call.state)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return Failure.of(error)

    def close(self) -> None:
        """Nothing is kept that outlives the threads."""
