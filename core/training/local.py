"""Local training of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from hetfl.config import RunOptions
from hetfl.data.dataset import Examples
from hetfl.data.kinds import CLASSIFY, TaskKind
from hetfl.data.kinds import kl_divergence as kl_divergence  # of the toolbox
from hetfl.models.normalization import BATCH_NORM
from hetfl.models.state import copy_state
from hetfl.training.augmentation import augment
from hetfl.training.device import autocast
from hetfl.training.dropout import seeded_random
from hetfl.training.task import Reply, Task


def fit(task: Task) -> Reply:
    """Plain local training on the client's own examples (`batch_rows`), from the tensors that it was sent."""
    optimizer = make_optimizer(task.model, task.options, task.round)
    last = descend(task, optimizer, local_batches(task), lambda x, y: total_loss(task, x, y))
    return Reply(copy_state(task.model), len(task.data.train), {"loss": last})


def total_loss(task: Task, x: Tensor, y: Tensor) -> Tensor:
    """The task's loss on a batch x (N, *shape), y (N,), with all penalties added."""
    loss = task.loss(task.forward(task.model, x), y)
    for penalty in task.penalties:
        loss = loss + penalty(task.model)
    return loss


def descend(
    task: Task, optimizer: torch.optim.Optimizer, batches: Iterable[tuple[Tensor, Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor], purpose: str = "dropout",
) -> float:  # fmt: skip
    """Takes a step of `optimizer` on `loss(x, y)` for each batch and returns the last batch's loss before its step (0: no batch).

    Gradients of entries outside the task's masks are 0, and the gradient's norm over all parameters is at most `options.clip`
    (0: any). Dropout draws from the client's stream `purpose`.
    """
    model, last, precision = task.model.train(), torch.zeros(()), autocast(task.options)
    masked = [(p, task.masks[name].to(p.device)) for name, p in model.named_parameters() if name in task.masks]
    with seeded_random(task.draws, task.stream(purpose)):
        for x, y in batches:
            optimizer.zero_grad()
            with precision:
                last = loss(x, y)
            last.backward()
            for parameter, mask in masked:
                if parameter.grad is not None:
                    parameter.grad.mul_(mask)
            if task.options.clip:
                nn.utils.clip_grad_norm_(model.parameters(), task.options.clip)
            optimizer.step()
        return last.item()


def local_batches(task: Task) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches x (N, *shape), y (N,) of a round, in the order of the client's stream "batches", augmented by "augment"."""
    data, draws = task.data.train, task.stream("augment")
    for rows in batch_rows(data, task.options, task.stream("batches"), task.model):
        yield augment(data.x[rows], task.options, draws), data.y[rows]


def batch_rows(data: Examples, options: RunOptions, generator: torch.Generator, model: nn.Module) -> list[Tensor]:
    """The rows (N,) of each batch of a round: `options.epochs` passes in new orders, or as many as `options.local_steps` needs;
    on the device of the examples.

    A batch of one example is left out for models with batch norm, which cannot normalise it, unless the client has no more.
    """
    skip_single = any(isinstance(m, BATCH_NORM) for m in model.modules()) and len(data) > 1

    def one_pass() -> list[Tensor]:
        return [rows for rows in data.rows(options.batch_size, generator) if not (skip_single and len(rows) == 1)]

    if not options.local_steps:
        return move_rows([rows for _ in range(options.epochs) for rows in one_pass()], data)
    batches = found = one_pass()
    while found and len(batches) < options.local_steps:
        found = one_pass()
        batches = batches + found
    return move_rows(batches[: options.local_steps], data)


def move_rows(batches: list[Tensor], data: Examples) -> list[Tensor]:
    """The rows of batches where the examples are; in one transfer, for a GPU waits at each."""
    if not batches or not data.x.is_cuda:
        return batches
    return list(torch.cat(batches).to(data.x.device).split([len(rows) for rows in batches]))


def make_optimizer(model: nn.Module, options: RunOptions, round: int) -> torch.optim.Optimizer:
    """The local optimiser of all parameters of `model` that are trained."""
    return make_optimizer_for([p for p in model.parameters() if p.requires_grad], options, round)


def make_step(model: nn.Module, options: RunOptions, kind: TaskKind = CLASSIFY) -> Callable[[Tensor, Tensor], None]:
    """A plain training step of `model` on a batch x (N, *shape), y (N, …), as `descend` takes them in round 1."""
    optimizer = make_optimizer(model.train(), options, 1)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        with autocast(options):
            loss = kind.loss(model(x), y)
        loss.backward()
        if options.clip:
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()

    return step


def make_optimizer_for(parameters: list[Tensor], options: RunOptions, round: int) -> torch.optim.Optimizer:
    """A new local optimiser of `parameters`, at the learning rate of `round`."""
    lr = learning_rate(options, round)
    if options.optimizer == "adam":
        return torch.optim.Adam(parameters, lr, weight_decay=options.weight_decay, fused=True)
    return torch.optim.SGD(parameters, lr, options.momentum, weight_decay=options.weight_decay, fused=True)


def learning_rate(options: RunOptions, round: int) -> float:
    """The learning rate of `round`, counted from 1; a milestone m lowers it from round m + 1 on (spec heterofl 5.6)."""
    return options.lr * options.lr_round_decay ** (round - 1) * options.lr_decay ** sum(m < round for m in options.lr_milestones)
