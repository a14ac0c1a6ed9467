"""Capacity as found by trying: a timed training step and the free memory of the machine that the node runs on."""

from __future__ import annotations

from pydantic import PrivateAttr

from hetfl import Field, Node, Plugin, Profile, hookimpl
from hetfl.profiling.capacity import WidthGrid, find_largest_width, parse_grid
from hetfl.profiling.meter import free_memory


class Measure(Plugin):
    """The largest width whose round ends before the deadline and whose training step fits into the free memory.

    Measured once a client, when it is first asked. What it finds is the machine's, not the seed's: such runs do not repeat.
    """

    deadline: float = Field(60.0, gt=0, description="seconds for a round's training")
    share: float = Field(0.5, gt=0, le=1, description="share of the free memory that training may use")
    grid: WidthGrid = Field("1,0.75,0.5,0.25", description="widths to choose from")
    _profiles: dict[int, Profile] = PrivateAttr(default_factory=dict)

    @hookimpl
    def profile(self, node: Node) -> Profile:
        if node.client not in self._profiles:
            self._profiles[node.client] = find_largest_width(parse_grid(self.grid), lambda ratio: self._name_exceeded(node, ratio))
        return self._profiles[node.client]

    def _name_exceeded(self, node: Node, ratio: float) -> str:
        """The first limit that the submodel of `ratio` exceeds, in words, or nothing."""
        memory, allowed = node.cost(ratio).memory, self.share * free_memory()
        if memory > allowed:
            return f"memory: {memory:,} of {allowed:,.0f} bytes at width {ratio:g}"
        seconds = node.probe(ratio) * node.steps
        return f"deadline: {seconds:.3g} of {self.deadline:g} s at width {ratio:g}" if seconds > self.deadline else ""
