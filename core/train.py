"""Local training, evaluation, and training on server data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetfl.core.config import RunOptions
from hetfl.core.data import Examples
from hetfl.core.device import arithmetic
from hetfl.core.dice import draws
from hetfl.core.types import Reply, Task
from hetfl.core.widths import copied

Seen = tuple[int, int, float]  # of one batch: examples, right answers, summed loss
BATCH_NORM = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Score:
    """Accuracy (share) and mean cross entropy on `examples` examples."""

    accuracy: float
    loss: float
    examples: int


def fit(task: Task) -> Reply:
    """Plain local training: `epochs` passes over the client's own examples from what it was sent."""
    optimizer = make_optimizer(task.model, task.options, task.round)
    last = descend(task, optimizer, passes(task), lambda x, y: total(task, x, y))
    return Reply(copied(task.model), len(task.data.train), {"loss": last})


def total(task: Task, x: Tensor, y: Tensor) -> Tensor:
    """The loss on a batch and the penalties."""
    loss = task.loss(task.forward(task.model, x), y)
    for penalty in task.penalties:
        loss = loss + penalty(task.model)
    return loss


def descend(
    task: Task, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor], purpose: str = "dropout",
) -> float:  # fmt: skip
    """A step of `optimizer` on `loss(x, y)` for each batch; entries outside the task's masks get no gradient. The last loss.

    Dropout draws from the client's stream `purpose`.
    """
    with draws(task.draws, task.stream(purpose)):
        return _descend(task, optimizer, batches, loss)


def _descend(
    task: Task, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]], loss: Callable[[Tensor, Tensor], Tensor]
) -> float:
    model, last = task.model.train(), torch.zeros(())
    masked = [(p, task.masks[name].to(p.device)) for name, p in model.named_parameters() if name in task.masks]
    for x, y in batches:
        optimizer.zero_grad()
        with arithmetic(task.options):
            last = loss(x, y)
        last.backward()
        for parameter, mask in masked:
            if parameter.grad is not None:
                parameter.grad.mul_(mask)
        if task.options.clip:
            nn.utils.clip_grad_norm_(model.parameters(), task.options.clip)
        optimizer.step()
    return last.item()


def passes(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of all local epochs."""
    data = task.data.train
    for rows in orders(data, task.options, task.stream("batches"), task.model):
        yield data.x[rows], data.y[rows]


def orders(data: Examples, options: RunOptions, generator: torch.Generator, model: nn.Module) -> list[Tensor]:
    """The rows of each batch of all local epochs; batch statistics of a single example do not exist, so such a last batch is
    left out."""
    lonely = any(isinstance(m, BATCH_NORM) for m in model.modules()) and len(data) > 1
    found = [rows for _ in range(options.epochs) for rows in data.rows(options.batch_size, generator)]
    return [rows for rows in found if not (lonely and len(rows) == 1)]


def make_optimizer(model: nn.Module, options: RunOptions, round: int) -> torch.optim.Optimizer:
    """The local optimiser of all parameters of `model` that are trained."""
    return optimizer_of([p for p in model.parameters() if p.requires_grad], options, round)


def optimizer_of(parameters: list[Tensor], options: RunOptions, round: int) -> torch.optim.Optimizer:
    """The local optimiser; a milestone m lowers the rate from round m + 1 on (spec heterofl 5.6)."""
    lr = options.lr * options.lr_decay ** sum(m < round for m in options.lr_milestones)
    if options.optimizer == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=options.weight_decay, fused=True)
    return torch.optim.SGD(parameters, lr, options.momentum, weight_decay=options.weight_decay, fused=True)


def evaluate(model: nn.Module, data: Examples, batch: int, labels: Tensor | None = None) -> Score:
    """Accuracy and loss of `model` on `data`; with `labels`, a bool for each class, the other classes' logits count as 0."""
    return total_score(examine(model, data, data.rows(batch), labels))


def examine(model: nn.Module, data: Examples, batches: Iterable[Tensor], labels: Tensor | None = None) -> list[Seen]:
    """What came of each of `batches`, positions in `data`."""
    model.eval()
    found = []
    with torch.inference_mode():
        for rows in batches:
            logits, y = model(data.x[rows]), data.y[rows]
            if labels is not None:
                logits = logits.masked_fill(~labels.to(logits.device), 0.0)
            loss = float(F.cross_entropy(logits, y, reduction="sum"))
            found.append((len(rows), int((logits.argmax(1) == y).sum()), loss))
    return found


def total_score(batches: Sequence[Seen]) -> Score:
    """The score over the batches that `examine` saw, summed in their order."""
    count = sum(n for n, _, _ in batches)
    right, loss = sum(r for _, r, _ in batches), sum(total for _, _, total in batches)
    return Score(right / max(count, 1), loss / max(count, 1), count)


def divergence(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher / T) || softmax(logits / T)), the mean over the batch."""
    own, goal = (logits / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    return (goal.exp() * (goal - own)).sum() / len(own)


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
