"""One device of a fleet: seconds and joules that a client's round takes on it."""

from __future__ import annotations

from dataclasses import dataclass

from hetfl.profiling.cost import Cost
from hetfl.profiling.steptime import StepTime


@dataclass(frozen=True)
class Work:
    """A client's part of a round: steps on examples of a submodel with this cost, and the bytes of its messages."""

    cost: Cost
    steps: float
    examples: float
    bytes_down: int
    bytes_up: int


@dataclass(frozen=True)
class Spent:
    """Seconds of download, training and upload, and joules."""

    down: float
    compute: float
    up: float
    joules: float

    @property
    def seconds(self) -> float:
        """From the server's first byte to the client's last."""
        return self.down + self.compute + self.up


@dataclass(frozen=True)
class Device:
    """What a client runs on: `memory` in bytes that training may use, `down` and `up` in bytes a second, `latency` in seconds a
    message, `watts` while it trains, `joules_down` and `joules_up` a byte, peak `tflops`."""

    name: str
    what: str
    step: StepTime
    tflops: float
    memory: float
    watts: float
    down: float
    up: float
    latency: float
    joules_down: float
    joules_up: float

    def spend(self, work: Work, within: float | None = None) -> Spent:
        """What a round costs: its steps, its bytes over the bandwidth, the latency of both messages.

        Where it is broken off `within` so many seconds, joules are those spent until then.
        """
        down, up = self.latency + work.bytes_down / self.down, self.latency + work.bytes_up / self.up
        compute = self.step.seconds(work.cost, work.steps, work.examples)
        times = (down, compute, up)
        left = sum(times) if within is None else within
        done = [min(max(left - sum(times[:i]), 0.0), each) for i, each in enumerate(times)]
        radio = self.joules_down * work.bytes_down * share(done[0], down) + self.joules_up * work.bytes_up * share(done[2], up)
        return Spent(down, compute, up, self.watts * done[1] + radio)

    def fitting_steps(self, work: Work, seconds: float) -> int:
        """How many of the steps can be done so that all ends within `seconds`."""
        spent = self.spend(work)
        left = seconds - spent.down - spent.up
        return int(min(work.steps, work.steps * left / spent.compute)) if left > 0 and spent.compute else 0


def share(part: float, whole: float) -> float:
    """part / whole, 1 where there is nothing to do."""
    return part / whole if whole else 1.0
