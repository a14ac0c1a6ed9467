"""A wrap: what is done around every client's training."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch
from torch import Tensor, nn

from hetfl import Field, Plugin, Reply, Task, hookimpl


class Template(Plugin):
    """FedProx: a penalty on the way from what was sent (Li et al., MLSys 2020)."""

    mu: float = Field(0.01, ge=0, description="strength of the penalty")

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        start = [p.detach().clone() for p in task.model.parameters()]
        task.penalties.append(lambda model: self.penalty(model, start))
        return (yield)

    def penalty(self, model: nn.Module, start: Sequence[Tensor]) -> Tensor:
        """mu / 2 times the squared distance of the parameters of `model` from `start`."""
        squares = [(p - s).square().sum() for p, s in zip(model.parameters(), start, strict=True)]
        return self.mu / 2 * torch.stack(squares).sum()
