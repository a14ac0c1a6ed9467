"""Tests of the round's models on one split: each model once, in pieces that the workers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

from torch import Tensor

from hetfl.data.dataset import Examples
from hetfl.hooks.server import Server
from hetfl.models.state import State
from hetfl.submodel.plan import Plan, Selection, is_whole
from hetfl.training.evaluation import Score, Seen, examine, total_score

PIECE = 2  # batches of evaluation that one worker takes at a time

Taken = Callable[[Plan, State], State]


@dataclass(frozen=True, eq=False)
class EvalJob:
    """What is to be tested: the part of `source` that `plan` takes, all of it without a plan."""

    source: State
    plan: Plan | None = None

    @property
    def key(self) -> tuple[int, int]:
        plain = self.plan is None or (isinstance(self.plan, Selection) and is_whole(self.plan))
        return 0 if plain else id(self.plan), id(self.source)


class Evaluator:
    """Scores candidates on `test`. Equal ones are scored once, and what the last round scored is known."""

    def __init__(self, server: Server, test: Examples, taken: Taken) -> None:
        self._server, self._test, self._taken = server, test, taken
        self._known: dict[tuple[int, int], tuple[EvalJob, Score]] = {}

    def scores(self, asked: Mapping[str, EvalJob], beside: Callable[[], object]) -> dict[str, Score]:
        """The score of each candidate by its name; `beside` is done by a worker in the meantime."""
        fresh = {c.key: c for c in asked.values() if c.key not in self._known}
        rows = self._test.rows(self._server.options.eval_batch_size)
        pieces = [rows[i : i + PIECE] for i in range(0, len(rows), PIECE)]
        jobs = [(c, piece) for c in fresh.values() for piece in pieces]
        tasks: list[Callable[[], object]] = [beside, *(partial(self._seen, *job) for job in jobs)]
        _, *found = self._server.pool.map(lambda task: task(), tasks)
        seen: dict[tuple[int, int], list[Seen]] = {key: [] for key in fresh}
        for (candidate, _), batches in zip(jobs, cast(list[list[Seen]], found), strict=True):
            seen[candidate.key] += batches
        scored = {key: (c, total_score(seen[key])) for key, c in fresh.items()}
        self._known = {c.key: scored.get(c.key) or self._known[c.key] for c in asked.values()}
        return {name: self._known[c.key][1] for name, c in asked.items()}

    def _seen(self, candidate: EvalJob, piece: tuple[Tensor, ...]) -> list[Seen]:
        plan, state = candidate.plan, candidate.source
        how = (None, None) if plan is None else (plan.sizes, plan.model)
        model = self._server.builder.load(state if plan is None else self._taken(plan, state), *how)
        return examine(model, self._test, piece)
