"""Clients as named device classes (field notes 4): what their peak compute and memory leave of the model's width."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import field_validator

from hetfl import Field, Node, Plugin, Profile, hookimpl
from hetfl.errors import nearest
from hetfl.profiling.capacity import WidthGrid, assign_mix, find_largest_width, parse_grid, parse_mix, parse_quantity

TABLE = Path(__file__).with_name("devices.toml")


class Devices(Plugin):
    """`fleet` names a fleet or a mix of classes (plugins/devices.toml). The table gives FedConv's testbed its 1, 0.75, 0.5, 0.25.

    A width r costs about r^2 of the full model's compute, which is taken to need `reference` TFLOP/s; memory is measured.
    """

    fleet: str = Field("fedconv-testbed", description="a fleet, or classes with counts or shares, e.g. nano:4,rpi4:6")
    grid: WidthGrid = Field("1,0.75,0.5,0.25", description="widths to choose from")
    reference: float = Field(0.9, gt=0, description="TFLOP/s that train the full model in time")
    share: float = Field(0.5, gt=0, le=1, description="share of a device's memory that training may use")

    @field_validator("fleet")
    @classmethod
    def _check_fleet(cls, fleet: str) -> str:
        parse_mix(read_table()["fleet"].get(fleet, fleet), find_class)
        return fleet

    @property
    def declared_widths(self) -> list[float]:
        return parse_grid(self.grid)

    @hookimpl
    def profile(self, node: Node) -> Profile:
        device = find_class(assign_mix(read_table()["fleet"].get(self.fleet, self.fleet), str, node.clients)[node.client])
        memory = parse_quantity(device["memory"]) * self.share

        def name_exceeded(ratio: float) -> str:
            if ratio**2 > device["tflops"] / self.reference:
                return f"compute: {device['what']} has {device['tflops']:g} TFLOP/s"
            return f"memory: {device['what']} has {device['memory']}" if node.cost(ratio).memory > memory else ""

        return find_largest_width(parse_grid(self.grid), name_exceeded)


@cache
def read_table() -> dict[str, Any]:
    """devices.toml: device classes under `class`, mixes of them under `fleet`."""
    return tomllib.loads(TABLE.read_text())


def find_class(name: str) -> dict[str, Any]:
    """The entry of a device class: what it is, TFLOP/s, memory. Raises ValueError for a name that the table lacks."""
    classes: dict[str, dict[str, Any]] = read_table()["class"]
    if name not in classes:
        message = f"no device class or fleet '{name}'{nearest(name, [*classes, *read_table()['fleet']])}"
        raise ValueError(f"{message} (classes: {', '.join(classes)}; fleets: {', '.join(read_table()['fleet'])})")
    return classes[name]
