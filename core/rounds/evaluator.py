"""Tests models on the test split: each once, in pieces that the workers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import cast

from torch import Tensor

from hetfl.data.dataset import Examples
from hetfl.hooks.server import Server
from hetfl.models.state import State
from hetfl.submodel.plan import Plan, Selection
from hetfl.training.evaluation import BatchScore, Score, score_batches, sum_scores

PIECE = 2  # batches of evaluation that one worker takes at a time


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
        self._server, self._test = server, test
        self._known: dict[tuple[int, int], tuple[EvalJob, Score]] = {}

    def score(
        self, jobs: Mapping[str, EvalJob], take: Callable[[Plan, State], State], meanwhile: Callable[[], object]
    ) -> dict[str, Score]:
        """The score of each job by its name; `take` gives a plan's part of a state; a worker does `meanwhile` beside it."""
        fresh = {job.key: job for job in jobs.values() if job.key not in self._known}
        rows = self._test.rows(self._server.options.eval_batch_size)
        pieces = [rows[i : i + PIECE] for i in range(0, len(rows), PIECE)]
        shares = [(job, piece) for job in fresh.values() for piece in pieces]
        tasks: list[Callable[[], object]] = [meanwhile, *(partial(self._examine, take, *share) for share in shares)]
        _, *found = self._server.pool.map(lambda task: task(), tasks)
        seen: dict[tuple[int, int], list[BatchScore]] = {key: [] for key in fresh}
        for (job, _), batches in zip(shares, cast(list[list[BatchScore]], found), strict=True):
            seen[job.key] += batches
        scored = {key: (job, sum_scores(seen[key])) for key, job in fresh.items()}
        self._known = {job.key: scored.get(job.key) or self._known[job.key] for job in jobs.values()}
        return {name: self._known[job.key][1] for name, job in jobs.items()}

    def _examine(self, take: Callable[[Plan, State], State], job: EvalJob, piece: tuple[Tensor, ...]) -> list[BatchScore]:
        plan, state = job.plan, job.source
        how = (None, None) if plan is None else (plan.sizes, plan.model)
        model = self._server.builder.load(state if plan is None else take(plan, state), *how)
        return score_batches(model, self._test, piece)
