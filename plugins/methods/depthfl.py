"""DepthFL (Kim et al., ICLR 2023): the deepest layers are cut, and the classifiers of all depths teach each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hetfl import Client, Field, Plan, Reply, Server, Task, hookimpl
from hetfl.models.early_exit import all_exits
from hetfl.plugins.methods.depth import BY, By, EarlyExits, count_layers
from hetfl.training.local import kl_divergence


class DepthFL(EarlyExits):
    """The layers up to an exit, at full width, with all exits on the way; each learns the labels and what all others say.

    A model may bring its exits (docs/strategies/scalefl.md); any other gets heads after its stages.
    """

    expected_failures: ClassVar[dict[str, str]] = {
        "respects_the_budget": "who can afford no exit gets the first one, with all that lies before it"
    }

    by: By = Field("parameters", description=BY)
    distill: float = Field(1.0, ge=0, description="weight of the exits' divergence from each other, once it has risen")
    rise: float = Field(0.3, ge=0, le=1, description="share of the rounds in which that weight rises")

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        exits: int = server.builder.model.depth  # type: ignore[assignment]
        plans = {h: server.select(exits=h) for h in range(1, exits + 1)}
        return [plans[count_layers(server, client, exits, plans.__getitem__, self.by)] for client in clients]

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        depth, weight = int(task.model.depth), self.distill * ramp_up(task.round - 1, self.rise * task.options.rounds)  # type: ignore[arg-type]
        kind = task.kind
        task.loss = lambda z, y: mutual_loss(z.chunk(depth, 1), y, weight, kind.loss, kind.divergence)
        with all_exits(task.model):
            return (yield)


def ramp_up(done: int, rounds: float) -> float:
    """exp(-5 (1 - t)^2), t the share of `rounds` that is done: from .0067 to 1."""
    return math.exp(-5 * (1 - min(done / rounds, 1.0)) ** 2) if rounds else 1.0


def mutual_loss(
    exits: Sequence[Tensor], y: Tensor, weight: float,
    supervise: Callable[..., Tensor] = F.cross_entropy, diverge: Callable[..., Tensor] = kl_divergence,
) -> Tensor:  # fmt: skip
    """sum_i (CE(z_i, y) + weight / (l - 1) sum_{j != i} KL(z_j || z_i)), no gradient into the teacher z_j; z_i (N, outputs).

    `supervise` and `diverge` are CE and KL of classes, the task kind's own of other targets.
    """
    total = torch.zeros((), device=y.device)
    for i, z in enumerate(exits):
        others = [diverge(z, teacher.detach()) for j, teacher in enumerate(exits) if j != i]
        total = total + supervise(z, y) + (weight * torch.stack(others).mean() if others else 0.0)
    return total
