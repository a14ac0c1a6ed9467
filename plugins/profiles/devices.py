"""Clients as devices of a fleet (field notes 4): what their peak compute and memory, or a round's deadline, leave of the width."""

from __future__ import annotations

from pydantic import field_validator

from hetfl import Field, Node, Plugin, Profile, UsageError, hookimpl
from hetfl.profiling.capacity import WidthGrid, find_largest_width, parse_grid
from hetfl.profiling.device import Work
from hetfl.profiling.fleets import find_fleet


class Devices(Plugin):
    """The run's --fleet, or `fleet`: a fleet or a mix of classes. FedConv's testbed gets its 1, 0.75, 0.5, 0.25.

    Memory is measured. Under --fleet with --deadline a width must also end in time; else a width r costs about r^2 of the full
    model's compute, which is taken to need `reference` TFLOP/s.
    """

    fleet: str = Field("fedconv-testbed", description="a fleet, or classes with counts or shares, e.g. nano:4,rpi4:6")
    grid: WidthGrid = Field("1,0.75,0.5,0.25", description="widths to choose from")
    reference: float = Field(0.9, gt=0, description="TFLOP/s that train the full model in time")

    @field_validator("fleet")
    @classmethod
    def _check_fleet(cls, fleet: str) -> str:
        try:
            find_fleet(fleet)
        except UsageError as error:
            raise ValueError(str(error)) from error
        return fleet

    @property
    def declared_widths(self) -> list[float]:
        return parse_grid(self.grid)

    @hookimpl
    def profile(self, node: Node) -> Profile:
        device = node.device or find_fleet(self.fleet).device(node.client, node.clients, node.seed)

        def name_exceeded(ratio: float) -> str:
            cost = node.cost(ratio)
            if cost.memory > device.memory:
                return f"memory: training may use {device.memory / 1e9:g} GB of {device.what}"
            if node.device is None or node.deadline is None:
                exceeds = ratio**2 > device.tflops / self.reference
                return f"compute: {device.what} has {device.tflops:g} TFLOP/s" if exceeds else ""
            seconds = device.spend(Work(cost, node.steps, node.examples, cost.bytes, cost.bytes)).seconds
            return f"deadline: {seconds:.3g} of {node.deadline:g} s on {device.what}" if seconds > node.deadline else ""

        return find_largest_width(parse_grid(self.grid), name_exceeded)
