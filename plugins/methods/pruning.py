"""What strategies share whose clients prune their own submodel round by round: when to prune, and how far."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hetfl import Task
from hetfl.training.evaluation import evaluate


def hold_out_and_score(task: Task) -> float:
    """Accuracy of what was sent on a fifth of the client's training examples, which from now on it does not train on."""
    train, held = task.data.train.split()
    task.data = replace(task.data, train=train)
    return evaluate(task.model, held, task.options.eval_batch_size).accuracy


def remaining_share(task: Task) -> float:
    """The share of the model that the client nominally still has."""
    return float(task.client_state.get("remaining", torch.ones(())))


def prune_share(now: float, rate: float, target: float, clamp: bool) -> float:
    """What remains after one more pruning by `rate`; with `clamp` never below `target`."""
    return max(now * (1 - rate), target) if clamp else now * (1 - rate)


def target_share(target: float | None, budget: Tensor) -> float:
    """The share at which a client stops: the option, or its parameter budget."""
    return float(budget) if target is None else target
