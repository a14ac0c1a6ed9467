"""Clip what a client changed, and no more: the L2 norm over all its tensors is at most a bound."""

from __future__ import annotations

from collections.abc import Generator

from hetfl import Field, Plugin, Reply, State, Task, hookimpl
from hetfl.models.state import copy_state
from hetfl.submodel.blocks import take
from hetfl.submodel.widths import within
from hetfl.training.clipping import clip_factors


class Clip(Plugin):
    """Scales a client's update down to an L2 norm of at most `norm`; around local training, so with any pair."""

    norm: float = Field(1.0, gt=0, description="largest L2 norm of a client's update")

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        before, sizes = copy_state(task.model), dict(task.plan_sizes)
        reply = yield
        reply.state = clip_update(reply.state, cut_as_reply(task, reply, before, sizes), self.norm)
        return reply


def cut_as_reply(task: Task, reply: Reply, before: State, sizes: dict[str, int]) -> State:
    """`before`, the tensors of the submodel of `sizes` that the client began with, without the units that its reply has cut."""
    if not reply.kept:
        return before
    index = within(task.builder.widths, sizes, reply.kept)
    return {name: take(t, index.get(name, {})) for name, t in before.items()}


def clip_update(state: State, before: State, most: float) -> State:
    """`state` with its distance from `before` (the L2 norm over all floating-point tensors) scaled down to at most `most`."""
    changes = {n: t - before[n] for n, t in state.items() if t.is_floating_point()}
    scale = float(clip_factors([c.double()[None] for c in changes.values()], most)) if changes else 1.0
    if scale == 1.0:
        return state
    return {n: before[n] + scale * changes[n] if n in changes else t for n, t in state.items()}
