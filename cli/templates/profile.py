"""A profile: what a device affords in a round."""

from __future__ import annotations

import torch

from hetfl import Field, Node, Plugin, Profile, hookimpl


class Template(Plugin):
    """The whole model, or a part of it in rounds in which the device is busy."""

    busy: float = Field(0.5, ge=0, le=1, description="share of the rounds in which a device is busy")
    width: float = Field(0.5, gt=0, le=1, description="width ratio that remains then")

    @hookimpl
    def profile(self, node: Node) -> Profile:
        draw = float(torch.rand((), generator=node.stream("busy")))
        return self.decide(draw)

    def decide(self, draw: float) -> Profile:
        """What a device affords whose draw in [0, 1) is `draw`."""
        return Profile(self.width, "busy") if draw < self.busy else Profile()
