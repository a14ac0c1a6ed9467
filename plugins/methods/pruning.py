"""What strategies share whose clients prune their own submodel round by round: when to prune, and how far."""

from __future__ import annotations

from dataclasses import replace

import torch

from hetfl import Client, ExtraSpec, State, Task
from hetfl.training.evaluation import evaluate

TOLERANCE = 1e-9  # of shares, relative

BUDGET = ExtraSpec(1, torch.float64)


def send_budget(client: Client) -> State:
    """The client's parameter budget as an extra."""
    return {"budget": torch.tensor(client.profile.parameters, dtype=torch.float64)}


def choose_share(task: Task, rate: float, threshold: float, target: float | None, clamp: bool) -> float | None:
    """The share of the model to which a client prunes before it trains: by `rate`, down to `target` (none: its parameter budget).

    None where it does not prune: what it was sent has an accuracy of `threshold` at most, or no more than the target is left of it.
    """
    accuracy = hold_out_and_score(task)
    least = float(task.extras["budget"]) if target is None else target
    after = next_share(remaining_share(task), rate, least, clamp)
    return after if accuracy > threshold else None


def hold_out_and_score(task: Task) -> float:
    """Accuracy of what was sent on a fifth of the client's training examples, which from now on it does not train on."""
    train, held = task.data.train.split()
    task.data = replace(task.data, train=train)
    return evaluate(task.model, held, task.options.eval_batch_size).accuracy


def remaining_share(task: Task) -> float:
    """The share of the model that the client nominally still has."""
    return float(task.client_state.get("remaining", torch.ones(())))


def next_share(now: float, rate: float, target: float, clamp: bool) -> float | None:
    """What remains after one more pruning by `rate`, with `clamp` never below `target`; None where no more than that is left.

    Shares are products of rates, so one that equals the target but for rounding has reached it: (1 - 0.2)^2 is not above 0.64.
    """
    if now <= target * (1 + TOLERANCE):
        return None
    return max(now * (1 - rate), target) if clamp else now * (1 - rate)


def note_remaining(task: Task, share: float) -> None:
    """Has the client remember the share that remains, in float64: in float32 it would lie beside a target that it reached."""
    task.client_state["remaining"] = torch.tensor(share, dtype=torch.float64)
