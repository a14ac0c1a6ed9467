"""What strategies share whose clients prune their own submodel round by round: when to prune, and how far."""

from __future__ import annotations

import torch
from torch import Tensor

from hetfl.core.data import Holding
from hetfl.core.train import evaluate
from hetfl.core.types import Task


def examined(task: Task) -> float:
    """Accuracy of what was sent on a fifth of the client's training examples, which from now on it does not train on."""
    train, held = task.data.train.split()
    task.data = Holding(train, task.data.test, task.data.counts)
    return evaluate(task.model, held, task.options.eval_batch_size).accuracy


def remaining(task: Task) -> float:
    """The share of the model that the client nominally still has."""
    return float(task.memory.get("remaining", torch.ones(())))


def pruned(now: float, rate: float, target: float, clamp: bool) -> float:
    """What remains after one more pruning by `rate`; with `clamp` never below `target`."""
    return max(now * (1 - rate), target) if clamp else now * (1 - rate)


def goal(target: float | None, budget: Tensor) -> float:
    """The share at which a client stops: the option, or its parameter budget."""
    return float(budget) if target is None else target
