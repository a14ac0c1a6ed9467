"""Submodels that grow during training, whatever the profile and the extraction (FedGMR's rising density, as gradual widths)."""

from __future__ import annotations

from collections.abc import Sequence

from hetfl import Field, Plugin, Server, hookimpl


class Grow(Plugin):
    """Each client starts with `start` times the width that its profile says, and has all of it after `until` of the rounds.

    FedGMR restores a sparse model's density by the client's own progress; here the width, which is what all extractions know, rises
    with the rounds, in `stages` equal steps.
    """

    start: float = Field(0.25, gt=0, le=1, description="share of its width that a client has in round 1")
    until: float = Field(0.5, gt=0, le=1, description="share of the rounds after which a client has its whole width")
    stages: int = Field(4, ge=2, description="widths from the first to the whole one")

    @hookimpl
    def allot(self, server: Server, widths: Sequence[float], round: int) -> list[float]:
        factor = self.find_factor(round, server.options.rounds)
        return [width * factor for width in widths]

    def find_factor(self, round: int, rounds: int) -> float:
        """The share of its width that a client has in `round`: stage 0 is `start`, the last stage 1."""
        last = self.stages - 1
        stage = min(last, int((round - 1) * self.stages / (self.until * rounds)))
        return self.start + (1 - self.start) * stage / last if stage < last else 1.0
