"""Clip what a client changed, and no more: the L2 norm over all its tensors is at most a bound."""

from __future__ import annotations

from collections.abc import Generator

import torch
from torch import Tensor

from hetfl import Field, Plugin, Reply, State, Task, hookimpl
from hetfl.models.state import copy_state
from hetfl.submodel.blocks import take
from hetfl.submodel.widths import within


class Clip(Plugin):
    """Scales a client's update down to an L2 norm of at most `norm`; around local training, so with any pair."""

    norm: float = Field(1.0, gt=0, description="largest L2 norm of a client's update")

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        before, sizes = copy_state(task.model), dict(task.plan_sizes)
        reply = yield
        reply.state = clipped(reply.state, begun(task, reply, before, sizes), self.norm)
        return reply


def begun(task: Task, reply: Reply, before: State, sizes: dict[str, int]) -> State:
    """What a client began with, cut as its reply is."""
    if not reply.kept:
        return before
    index = within(task.builder.widths, sizes, reply.kept)
    return {name: take(t, index.get(name, {})) for name, t in before.items()}


def clipped(state: State, before: State, most: float) -> State:
    """`state` with its distance from `before` scaled down to at most `most`."""
    changes = {n: t - before[n] for n, t in state.items() if t.is_floating_point()}
    scale = min(1.0, most / max(float(norm(list(changes.values()))), 1e-12))
    if scale == 1.0:
        return state
    return {n: before[n] + scale * changes[n] if n in changes else t for n, t in state.items()}


def norm(tensors: list[Tensor]) -> Tensor:
    """The L2 norm over all of `tensors`."""
    whole: Tensor = torch.linalg.vector_norm(torch.stack([t.double().norm() for t in tensors] or [torch.zeros(())]))
    return whole
