"""Clip what a client changed, and no more: the L2 norm over all its tensors is at most a bound."""

from __future__ import annotations

from dataclasses import replace

from hetfl import Field, Plugin, ReceivedReply, State, hookimpl
from hetfl.training.stacking import clip_factors


class Clip(Plugin):
    """Scales what arrives of a client's update down to an L2 norm of at most `norm`; on the server, whatever the client does."""

    norm: float = Field(1.0, gt=0, description="largest L2 norm of a client's update")

    @hookimpl
    def receive(self, received: ReceivedReply) -> ReceivedReply:
        state = clip_update(received.reply.state, received.sent, self.norm)
        return replace(received, reply=replace(received.reply, state=state))


def clip_update(state: State, before: State, most: float) -> State:
    """`state` with its distance from `before` (the L2 norm over all floating-point tensors) scaled down to at most `most`.

    Entries that a mask leaves out are 0 in both, and stay so.
    """
    changes = {n: t - before[n] for n, t in state.items() if t.is_floating_point()}
    scale = float(clip_factors([c.double()[None] for c in changes.values()], most)) if changes else 1.0
    if scale == 1.0:
        return state
    return {n: before[n] + scale * changes[n] if n in changes else t for n, t in state.items()}
