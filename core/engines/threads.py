"""How the local engine deals out a round's messages: what is worth a job of its own, who trains as one, who begins first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import Context, Message, MessageType
from flwr.clientapp import ClientApp

from hetfl.data.dataset import Examples
from hetfl.engines.faults import raised
from hetfl.engines.local import Call
from hetfl.models.state import tensors
from hetfl.rounds.client import ClientRuntime, client_id
from hetfl.rounds.messages import Instruction
from hetfl.training import vectorized
from hetfl.training.evaluation import Score
from hetfl.training.task import Reply
from hetfl.training.vectorized import Member, MemberResult

SLIGHT = 1e7  # parameters x examples up to which several clients share a job

SHARES = 8  # jobs that a worker gets at least, where there are enough clients


@dataclass(frozen=True, eq=False)
class Job:
    """Some messages for one worker, in client order; with `vmap`, their clients train as one vmap group."""

    calls: list[Call]
    cost: float
    vmap: bool = False


class ThreadWorkers:
    """Answers messages for all clients of one process; `vmap_clients` is how many clients may train as one."""

    def __init__(self, app: ClientApp, site: ClientRuntime, workers: int, vmap_clients: int = 1) -> None:
        self._app, self._site, self._workers, self._vmap_clients = app, site, workers, vmap_clients
        self._slight = SLIGHT if site.options.timeout is None else 0.0  # a client that may be given up has a job of its own

    def jobs(self, calls: Sequence[Call]) -> list[Job]:
        """What is to be done, in the order of the first client of each job; the split never changes a result."""
        alone, groups, known = [], dict[object, list[Call]](), dict[int, tuple[int, ...] | None]()
        for call in calls:
            shape = self._shape(call, known)
            alone.append(call) if shape is None else groups.setdefault(shape, []).append(call)
        together = [g[i : i + self._vmap_clients] for g in groups.values() for i in range(0, len(g), self._vmap_clients)]
        return self._chunks(alone) + [Job(g, sum(map(self._cost, g)), vmap=True) for g in together]

    def close(self) -> None:
        """Nothing is kept that outlives the threads."""

    def _chunks(self, calls: list[Call]) -> list[Job]:
        """Jobs of one client each, or of several where these are slight."""
        most, jobs = max(1, len(calls) // (self._workers * SHARES)), list[Job]()
        for call in calls:
            cost = self._cost(call)
            if jobs and len(jobs[-1].calls) < most and jobs[-1].cost + cost <= self._slight:
                jobs[-1] = Job([*jobs[-1].calls, call], jobs[-1].cost + cost)
            else:
                jobs.append(Job([call], cost))
        return jobs

    def _cost(self, call: Call) -> float:
        """Predicted work: parameters times examples."""
        down = self._site.desk.peek(call[0].content)
        if not isinstance(down, Instruction):
            return 0.0
        return float(len(self._train(call[1])) * sum(t.numel() for t in down.state.values()))

    def _shape(self, call: Call, known: dict[int, tuple[int, ...] | None]) -> object:
        """What clients of one vmap group have in common; None for a client that trains by itself. `known`: those of states seen."""
        down = self._site.desk.peek(call[0].content)
        if self._vmap_clients < 2 or call[0].metadata.message_type != MessageType.TRAIN or not isinstance(down, Instruction):
            return None
        if down.model or down.masks or down.local or down.up is not None or down.sizes is None:
            return None
        if id(down.state) not in known:
            model = self._site.builder.module(down.sizes)
            whole = down.state.keys() >= tensors(model).keys()
            known[id(down.state)] = (*down.sizes.values(), vectorized.allows_padding(model)) if whole else None
        shape = known[id(down.state)]
        return shape and (shape, None if shape[-1] else len(self._train(call[1])))

    def _train(self, context: Context) -> Examples:
        return self._site.federation.clients[client_id(context)].train

    def work(self, job: Job) -> list[Message]:
        """The replies of a job, in its clients' order; for a client that raises, an error with its traceback."""
        if job.vmap and (replies := self._vmap_replies(job)):
            return replies
        return [self._reply(message, context) for message, context in job.calls]

    def _reply(self, message: Message, context: Context) -> Message:
        try:
            return self._app(message, context)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return raised(message, error)

    def _vmap_replies(self, job: Job) -> list[Message]:
        """The replies of clients that train as one; none where that cannot be, and then each is to train by itself."""
        downs = [self._site.desk.peek(message.content) for message, _ in job.calls]
        try:
            replies = self._together([(d, c) for d, (_, c) in zip(downs, job.calls, strict=True) if isinstance(d, Instruction)])
        except Exception:
            return []
        for message, _ in job.calls:
            self._site.desk.open(message.content)
        return [Message(self._site.desk.seal(r), reply_to=m) for r, (m, _) in zip(replies, job.calls, strict=True)]

    def _together(self, members: Sequence[tuple[Instruction, Context]]) -> list[Reply]:
        site, started, down = self._site, time.perf_counter(), members[0][0]
        model = site.builder.module(down.sizes)
        group = [Member(client_id(context), down.state, self._train(context)) for down, context in members]
        trained = vectorized.train(model, group, site.options, down.round)
        seconds = (time.perf_counter() - started) / len(group)
        replies = [Reply(t.state, len(m.train), {"loss": t.loss, "seconds": seconds}) for t, m in zip(trained, group, strict=True)]
        self._examined(members, trained, replies)
        return replies

    def _examined(
        self, members: Sequence[tuple[Instruction, Context]], trained: Sequence[MemberResult], replies: Sequence[Reply]
    ) -> None:
        """Notes how each trained model does on its client's own test data."""
        own = [self._site.federation.clients[client_id(context)].test for _, context in members]
        having = [k for k, test in enumerate(own) if len(test)]
        if having:
            model, batch = self._site.builder.module(members[0][0].sizes), self._site.options.eval_batch_size
            scores = vectorized.evaluate(model, [trained[k].state for k in having], [own[k] for k in having], batch)
            for k, score in zip(having, scores, strict=True):
                replies[k].metrics |= noted(score)


def noted(score: Score) -> dict[str, float]:
    """A score as the metrics of a reply."""
    return {"own accuracy": score.accuracy, "own loss": score.loss}
