"""Tuning on server data, the best by the hold-out loss kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hetfl.data.dataset import Examples

RISEN = 2.0  # times the loss before tuning


def risen(purpose: str, start: float, last: float, kept: int) -> str | None:
    """The alarm for tuning on server data that made the hold-out's loss rise much; the control may do as it likes."""
    if kept or purpose == "control" or not last > RISEN * start + 0.1:
        return None
    return f"tuning ({purpose}) made the loss on the hold-out rise from {start:.3g} to {last:.3g}; none of it was kept"


@dataclass(frozen=True)
class Tuned:
    """What tuning on server data came to: hold-out loss at step 0 and at the step that was kept."""

    start: float
    best: float
    step: int
    steps: int  # taken, of those that were allowed
    last: float = 0.0  # hold-out loss at the end


def tune(
    data: Examples, parameters: Sequence[Tensor], loss: Callable[[Tensor], Tensor], judge: Callable[[], float],
    generator: torch.Generator, *, steps: int, lr: float, batch: int, every: int = 10, patience: int = 0,
    keep: Sequence[Tensor] = (),
) -> Tuned:  # fmt: skip
    """Adam on `parameters` for `steps` batches of server data; the step with the lowest `judge()` is kept, step 0 included.

    `loss` gets the positions of a batch within `data`; `judge`, the loss on the hold-out, is asked every `every` steps.
    With `patience`, tuning ends after so many judgements in a row that were no better. `keep` are further tensors
    (buffers) that belong to a step. All are changed in place.
    """
    how: dict[str, Any] = {"steps": steps, "lr": lr, "batch": batch, "every": every, "patience": patience, "keep": keep}
    tuned = tune_together(
        data, parameters, lambda rows: loss(rows[0]), lambda: torch.tensor([judge()], dtype=torch.float64), [generator], **how
    )
    return tuned[0]


def tune_together(
    data: Examples, parameters: Sequence[Tensor], loss: Callable[[Tensor], Tensor], judge: Callable[[], Tensor],
    generators: Sequence[torch.Generator], *,
    steps: int, lr: float, batch: int, every: int = 10, patience: int = 0, keep: Sequence[Tensor] = (),
) -> list[Tuned]:  # fmt: skip
    """`tune` for several problems of one form, each as if alone: their tensors are joined along a leading dim (problems, …).

    `loss` gets the positions of all their batches (problems, batch) and gives the sum of their losses, `judge` one for each.
    """
    optimizer, tensors = torch.optim.Adam(list(parameters), lr, fused=True), [*parameters, *keep]
    orders = zip(*(rows_of(len(data), batch, generator) for generator in generators), strict=True)
    looks, saved = Looks(judged(judge)), [t.detach().clone() for t in tensors]
    for step, rows in zip(range(1, steps + 1), orders, strict=False):
        optimizer.zero_grad()
        loss(torch.stack(rows)).backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            better = looks.take(step, judged(judge), patience * every)
            saved = [chosen(better, t.detach(), old) for t, old in zip(tensors, saved, strict=True)]
            if not looks.going:
                break
    with torch.no_grad():
        for tensor, value in zip(tensors, saved, strict=True):
            tensor.copy_(value)
    return looks.results()


class Looks:
    """What the looks at the hold-out of several problems came to; `start` are their losses before the first step."""

    def __init__(self, start: Tensor) -> None:
        self._start, self._best, self._step, self._taken = start, start, torch.zeros(len(start)), torch.zeros(len(start))
        self._going, self._last = torch.ones(len(start), dtype=torch.bool), start

    @property
    def going(self) -> bool:
        return bool(self._going.any())

    def take(self, step: int, now: Tensor, patience: int) -> Tensor:
        """Which problems are better than ever before after `step` steps; one that was not for `patience` steps has ended."""
        better = self._going & (now < self._best)
        self._taken, self._last = torch.where(self._going, float(step), self._taken), torch.where(self._going, now, self._last)
        self._best, self._step = torch.where(better, now, self._best), torch.where(better, float(step), self._step)
        if patience:
            self._going = self._going & (step - self._step < patience)
        return better

    def results(self) -> list[Tuned]:
        columns = (t.tolist() for t in (self._start, self._best, self._step, self._taken, self._last))
        return [Tuned(start, best, int(step), int(taken), last) for start, best, step, taken, last in zip(*columns, strict=True)]


def chosen(better: Tensor, now: Tensor, old: Tensor) -> Tensor:
    """The tensors (problems, …) of `now` where `better`, else `old`; with one problem they need no leading dim."""
    if bool(better.all()):
        return now.clone()
    return torch.where(better.view(-1, *[1] * (old.ndim - 1)), now, old) if bool(better.any()) else old


def judged(judge: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return judge().nan_to_num(nan=float("inf"), posinf=float("inf"))


def rows_of(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of row numbers, each pass in a new order."""
    while True:
        yield from torch.randperm(count, generator=generator).split(min(batch, count))
