"""Local training of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from hetfl.config import RunOptions
from hetfl.data.dataset import Examples
from hetfl.models.normalization import BATCH_NORM
from hetfl.models.state import copy_state
from hetfl.training.clipping import clip_gradients
from hetfl.training.device import arithmetic
from hetfl.training.dropout import seeded_random
from hetfl.training.task import Reply, Task


def fit(task: Task) -> Reply:
    """Plain local training: `epochs` passes over the client's own examples from what it was sent."""
    optimizer = make_optimizer(task.model, task.options, task.round)
    last = descend(task, optimizer, local_batches(task), lambda x, y: total_loss(task, x, y))
    return Reply(copy_state(task.model), len(task.data.train), {"loss": last})


def total_loss(task: Task, x: Tensor, y: Tensor) -> Tensor:
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
    with seeded_random(task.draws, task.stream(purpose)):
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
            clip_gradients(model.parameters(), task.options.clip)
        optimizer.step()
    return last.item()


def local_batches(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of all local epochs."""
    data = task.data.train
    for rows in batch_rows(data, task.options, task.stream("batches"), task.model):
        yield data.x[rows], data.y[rows]


def batch_rows(data: Examples, options: RunOptions, generator: torch.Generator, model: nn.Module) -> list[Tensor]:
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


def kl_divergence(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher / T) || softmax(logits / T)), the mean over the batch."""
    own, goal = (logits / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    return (goal.exp() * (goal - own)).sum() / len(own)
