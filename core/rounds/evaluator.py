"""Tests models on the test split: each once, in pieces that the workers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from hetfl.data.dataset import Examples
from hetfl.hooks.server import Server
from hetfl.models.state import State
from hetfl.submodel.plan import Plan, Selection
from hetfl.training.evaluation import BatchScore, Score, score_batches, sum_scores

PIECE = 2  # batches of evaluation that one worker takes at a time

Take = Callable[[Plan, State], State]  # a plan's part of a state


@dataclass(frozen=True, eq=False)
class EvalJob:
    """What is to be tested: the part of `source` that `plan` takes, all of it without a plan."""

    source: State
    plan: Plan | None = None

    @cached_property
    def key(self) -> tuple[int, int]:
        plain = self.plan is None or (isinstance(self.plan, Selection) and self.plan.whole)
        return 0 if plain else id(self.plan), id(self.source)


class Evaluator:
    """Scores models on the split `test`: each once, in pieces that the workers share; what the last round scored is known."""

    def __init__(self, server: Server, test: Examples) -> None:
        self._server, self._test, rows = server, test, test.rows(server.options.eval_batch_size)
        self._pieces = [rows[i : i + PIECE] for i in range(0, len(rows), PIECE)]
        self._known: dict[tuple[int, int], tuple[EvalJob, Score]] = {}

    def score(
        self, jobs: Mapping[str, EvalJob], take: Take, meanwhile: Callable[[], Mapping[str, EvalJob]]
    ) -> dict[str, Score]:  # fmt: skip
        """The score of each job by its name; a worker does `meanwhile` beside them, and what that answers is scored then."""
        later = self._score_new(jobs, take, meanwhile)
        self._score_new(later, take)
        asked = {**jobs, **later}
        self._known = {job.key: self._known[job.key] for job in asked.values()}
        return {name: self._known[job.key][1] for name, job in asked.items()}

    def _score_new(self, jobs: Mapping[str, EvalJob], take: Take, meanwhile: Callable[[], Any] = dict) -> Any:
        """Scores the jobs that are not known yet; what `meanwhile` answers, which is done beside it."""
        fresh: dict[tuple[int, int], EvalJob] = {}
        for job in jobs.values():
            if job.key not in self._known:
                fresh.setdefault(job.key, job)
        shares = [(job, piece) for job in fresh.values() for piece in self._pieces]
        tasks: list[Callable[[], Any]] = [meanwhile, *(partial(self._examine, take, *share) for share in shares)]
        answer, *scored = self._server.pool.map(lambda task: task(), tasks) if shares else [meanwhile()]
        seen: dict[tuple[int, int], list[BatchScore]] = {key: [] for key in fresh}
        for (job, _), batches in zip(shares, scored, strict=True):
            seen[job.key] += batches
        self._known |= {key: (job, sum_scores(seen[key])) for key, job in fresh.items()}
        return answer

    def _examine(self, take: Take, job: EvalJob, piece: tuple[Tensor, ...]) -> list[BatchScore]:
        plan, state = job.plan, job.source
        how = (None, None) if plan is None else (plan.sizes, plan.model)
        model = self._server.builder.load(state if plan is None else take(plan, state), *how)
        return score_batches(model, self._test, piece)
