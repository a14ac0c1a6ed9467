"""Before anything trains: which width each class of a fleet can hold, what a round takes there, and what binds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from hetfl.profiling.capacity import find_largest_width
from hetfl.profiling.cost import Cost
from hetfl.profiling.device import Device, Spent, Work
from hetfl.profiling.fleets import Fleet
from hetfl.registry import Entry

COMPUTES = {  # by what an extraction works on: what a client of width r computes, and what travels
    "channel": "the submodel of its width",
    "entry": "the whole model; the share of entries that goes with its width travels",
    "whole": "the whole model",
}


@dataclass(frozen=True)
class Limits:
    """What a round may take of a device: None is no limit. Memory is the device's own."""

    seconds: float | None = None
    joules: float | None = None
    bytes: float | None = None


@dataclass(frozen=True)
class ClassPlan:
    """A class of a fleet: the width that it holds, None where it holds none; what a round takes, and what keeps it from more."""

    name: str
    share: float
    width: float | None
    spent: Spent
    bytes: int
    binds: str


def group_extractions(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """The extractions by what their clients compute, as their granularity in the registry says."""
    groups: dict[str, list[str]] = {kind: [] for kind in COMPUTES}
    for entry in entries:
        if entry.role == "extract":
            kind = entry.granularity.replace(",", " ").partition(" ")[0]
            groups[kind if kind in groups else "whole"].append(entry.name)
    return groups


def cost_of(kind: str, cost: Callable[[float], Cost], ratio: float) -> Cost:
    """What a client of width `ratio` computes and is sent."""
    if kind == "channel":
        return cost(ratio)
    whole = cost(1.0)
    kept = int(whole.bytes * ratio**2 + whole.parameters / 8) if kind == "entry" and ratio < 1 else whole.bytes
    return replace(whole, bytes=kept)


def plan_classes(
    fleet: Fleet, kind: str, cost: Callable[[float], Cost], grid: Sequence[float], steps: int, examples: int, limits: Limits
) -> list[ClassPlan]:  # fmt: skip
    """Each class of the fleet, as its median device, on `steps` steps of `examples` examples a round."""
    total = sum(share for _, share in fleet.members())
    widths = [1.0] if kind == "whole" else grid
    found = []
    for name, share in fleet.members():
        device = fleet.typical(name)

        def work(ratio: float) -> Work:
            spends = cost_of(kind, cost, ratio)
            return Work(spends, steps, examples, spends.bytes, spends.bytes)

        def exceeded(ratio: float, device: Device = device) -> str:
            return name_exceeded(device, work(ratio), limits)

        try:
            profile = find_largest_width(widths, exceeded)
            width, binds = profile.width, profile.bottleneck
        except ValueError:
            width, binds = None, exceeded(min(widths))
        shown = work(width or min(widths))
        found.append(ClassPlan(name, share / total, width, device.spend(shown), 2 * shown.cost.bytes, binds))
    return found


def name_exceeded(device: Device, work: Work, limits: Limits) -> str:
    """The first limit that a round exceeds, with what would be needed; "" for none."""
    spent = device.spend(work)
    if work.cost.memory > device.memory:
        return f"memory: {work.cost.memory / 1e6:,.0f} of {device.memory / 1e6:,.0f} MB"
    if limits.seconds is not None and spent.seconds > limits.seconds:
        longest = max(("down", spent.down), ("training", spent.compute), ("up", spent.up), key=lambda part: part[1])
        return f"deadline: {spent.seconds:,.3g} of {limits.seconds:g} s, of which {longest[0]} {longest[1]:,.3g}"
    if limits.joules is not None and spent.joules > limits.joules:
        return f"energy: {spent.joules:,.3g} of {limits.joules:g} J"
    if limits.bytes is not None and work.bytes_down + work.bytes_up > limits.bytes:
        return f"bytes: {(work.bytes_down + work.bytes_up) / 1e6:,.3g} of {limits.bytes / 1e6:g} MB"
    return ""
