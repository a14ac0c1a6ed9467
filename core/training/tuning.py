"""Tuning on server data, the best by the hold-out loss kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hetfl.data.dataset import Examples

ALARM_FACTOR = 2.0  # times the hold-out loss before tuning


@dataclass(frozen=True)
class TuningResult:
    """What tuning on server data did to the loss on the hold-out.

    `start` and `last` are the losses before the first and after the last step, `best` the one after `step` steps, whose tensors
    were restored; `steps` were taken, of those that were allowed.
    """

    start: float
    best: float
    step: int
    steps: int
    last: float = 0.0


def explain_risen_loss(purpose: str, start: float, last: float, step: int) -> str | None:
    """The alarm for a tuning whose hold-out loss rose from `start` far beyond it, to `last`, or None.

    No alarm where some of its steps (`step` > 0) were of use, nor for the control, whose loss is its own affair.
    """
    if step or purpose == "control" or not last > ALARM_FACTOR * start + 0.1:
        return None
    return f"tuning ({purpose}) made the loss on the hold-out rise from {start:.3g} to {last:.3g}; none of it was kept"


def tune(
    data: Examples, parameters: Sequence[Tensor], loss: Callable[[Tensor], Tensor], holdout_loss: Callable[[], float],
    generator: torch.Generator, *, steps: int, lr: float, batch: int, every: int = 10, patience: int = 0,
    keep: Sequence[Tensor] = (), watch: Callable[[int], None] | None = None,
) -> TuningResult:  # fmt: skip
    """Adam on `parameters` for `steps` batches of server data; ends with the tensors of the step of lowest hold-out loss.

    `loss` gets the positions (batch,) of a batch within `data`. `holdout_loss` is computed before the first step, every `every`
    steps and after the last; with `patience`, tuning ends after so many in a row that were no lower. `keep` are further tensors
    (buffers) that belong to a step. All are changed in place. `watch` is told the number of each step after which it looked.
    """
    options: dict[str, Any] = {"steps": steps, "lr": lr, "batch": batch, "every": every, "patience": patience, "keep": keep,
                               "watch": watch}  # fmt: skip
    results = tune_together(
        data, parameters, lambda rows: loss(rows[0]), lambda: torch.tensor([holdout_loss()], dtype=torch.float64), [generator],
        **options,
    )  # fmt: skip
    return results[0]


def tune_together(
    data: Examples, parameters: Sequence[Tensor], loss: Callable[[Tensor], Tensor], holdout_losses: Callable[[], Tensor],
    generators: Sequence[torch.Generator], *,
    steps: int, lr: float, batch: int, every: int = 10, patience: int = 0, keep: Sequence[Tensor] = (),
    watch: Callable[[int], None] | None = None,
) -> list[TuningResult]:  # fmt: skip
    """`tune` for several problems of one form, each as if alone: their tensors are joined along a leading dim (problems, …).

    `loss` gets the positions of all their batches (problems, batch) and gives the sum of their losses; `holdout_losses` gives
    (problems,).
    """
    optimizer, tensors = torch.optim.Adam(list(parameters), lr, fused=True), [*parameters, *keep]
    batches = zip(*(cycle_batches(len(data), batch, generator) for generator in generators), strict=True)
    stopping, best = EarlyStopping(evaluate_holdout(holdout_losses)), [t.detach().clone() for t in tensors]
    for step, rows in zip(range(1, steps + 1), batches, strict=False):
        optimizer.zero_grad()
        loss(torch.stack(rows)).backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            if watch is not None:
                watch(step)
            better = stopping.update(step, evaluate_holdout(holdout_losses), patience * every)
            best = [select_better(better, t.detach(), old) for t, old in zip(tensors, best, strict=True)]
            if not stopping.active:
                break
    with torch.no_grad():
        for tensor, value in zip(tensors, best, strict=True):
            tensor.copy_(value)
    return stopping.results()


class EarlyStopping:
    """For several problems at once: the best hold-out loss so far and its step; `start` (problems,) are the losses at step 0."""

    def __init__(self, start: Tensor) -> None:
        self._start, self._best, self._last = start, start, start
        self._best_step, self._steps = torch.zeros(len(start)), torch.zeros(len(start))
        self._active = torch.ones(len(start), dtype=torch.bool)

    @property
    def active(self) -> bool:
        """Whether some problem is still being tuned."""
        return bool(self._active.any())

    def update(self, step: int, losses: Tensor, patience: int) -> Tensor:
        """Bool (problems,): whose loss after `step` steps is lower than ever before.

        A problem whose best is `patience` steps old ends (0: none does): its later losses no longer count.
        """
        better = self._active & (losses < self._best)
        self._steps, self._last = torch.where(self._active, float(step), self._steps), torch.where(self._active, losses, self._last)
        self._best = torch.where(better, losses, self._best)
        self._best_step = torch.where(better, float(step), self._best_step)
        if patience:
            self._active = self._active & (step - self._best_step < patience)
        return better

    def results(self) -> list[TuningResult]:
        columns = (t.tolist() for t in (self._start, self._best, self._best_step, self._steps, self._last))
        rows = zip(*columns, strict=True)
        return [TuningResult(start, best, int(step), int(steps), last) for start, best, step, steps, last in rows]


def select_better(better: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The tensors (problems, …) of `new` where `better` (problems,), else `old`; with one problem they need no leading dim."""
    if bool(better.all()):
        return new.clone()
    return torch.where(better.view(-1, *[1] * (old.ndim - 1)).to(old.device), new, old) if bool(better.any()) else old


def evaluate_holdout(losses: Callable[[], Tensor]) -> Tensor:
    """The losses (problems,) without a gradient; NaN counts as infinite, so that it is never the best."""
    with torch.no_grad():
        return losses().cpu().nan_to_num(nan=float("inf"), posinf=float("inf"))


def halve_rate(lr: float, round: int, every: int) -> float:
    """The learning rate in `round` when it is halved every `every` rounds (0: never) while above 1e-4 (spec fedconv 6.7)."""
    for _ in range(round // every if every else 0):
        lr = lr / 2 if lr > 1e-4 else lr
    return lr


def cycle_batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of positions in range(count), int64 (batch,), each pass in a new order; its last batch may be short."""
    while True:
        yield from torch.randperm(count, generator=generator).split(min(batch, count))
