"""Capacity from budgets: the largest width whose submodel, as measured, stays within all of them (spec dac 1, field notes 4)."""

from __future__ import annotations

from pydantic import field_validator

from hetfl import Field, Node, Plugin, Profile, hookimpl
from hetfl.profiling.capacity import WidthGrid, assign_mix, find_largest_width, parse_grid, parse_mix, parse_quantity


class Budget(Plugin):
    """Every budget is an amount for all, or amounts with counts or shares over the clients: 64MB:2,16MB:8."""

    memory: str | None = Field(None, description="bytes of a training step, e.g. 64MB:2,16MB:8")
    macs: str | None = Field(None, description="multiply-accumulates of one example, e.g. 20M")
    parameters: str | None = Field(None, description="parameters, e.g. 100k")
    deadline: float | None = Field(None, gt=0, description="seconds for a round's training and both transfers (with flops)")
    flops: str = Field("10G", description="floating-point operations a second that a device sustains")
    bandwidth: str = Field("1MB", description="bytes a second that a device transfers")
    grid: WidthGrid = Field("1,0.75,0.5,0.25,0.125,0.0625", description="widths to choose from")

    @field_validator("memory", "macs", "parameters", "flops", "bandwidth", mode="before")
    @classmethod
    def _check_amounts(cls, text: object) -> object:
        text = str(text) if isinstance(text, int | float) else text
        if isinstance(text, str):
            parse_mix(text, parse_quantity)
        return text

    @property
    def declared_widths(self) -> list[float]:
        return parse_grid(self.grid)

    @hookimpl
    def profile(self, node: Node) -> Profile:
        return find_largest_width(parse_grid(self.grid), lambda ratio: self._name_exceeded(node, ratio))

    def _name_exceeded(self, node: Node, ratio: float) -> str:
        """The first budget that the submodel of `ratio` exceeds, in words, or nothing."""
        cost = node.cost(ratio)
        needs = {"memory": cost.memory, "macs": cost.macs, "parameters": cost.parameters}
        for name, needed in needs.items():
            allowed = self._amount(node, getattr(self, name))
            if allowed is not None and needed > allowed:
                return f"{name}: {needed:,} of {allowed:,.0f} at width {ratio:g}"
        seconds = self._round_seconds(node, ratio)
        if self.deadline is not None and seconds > self.deadline:
            return f"deadline: {seconds:.3g} of {self.deadline:g} s at width {ratio:g}"
        return ""

    def _round_seconds(self, node: Node, ratio: float) -> float:
        """3 * 2 * MACs * examples / flops + both payloads / bandwidth."""
        cost = node.cost(ratio)
        flops, bandwidth = self._amount(node, self.flops) or 1.0, self._amount(node, self.bandwidth) or 1.0
        return 6 * cost.macs * node.examples / flops + 2 * cost.bytes / bandwidth

    def _amount(self, node: Node, text: str | None) -> float | None:
        """The node's own amount under the mix `text`."""
        return None if text is None else assign_mix(text, parse_quantity, node.clients)[node.client]
