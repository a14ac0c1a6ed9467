"""The virtual clock of a run with --fleet: who is there, who is in time, what a round takes. It reads no clock of this machine.

A client's seconds follow from its device, the cost of its submodel as counted, its steps and its bytes; so the same bits come out
however fast the machine is, and a run that goes on knows the time from its last row.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from hetfl.config import RunOptions
from hetfl.errors import RunError, UsageError
from hetfl.profiling.device import Device, Spent, Work
from hetfl.profiling.fleets import Fleet, find_fleet
from hetfl.rounds.messages import Assignment
from hetfl.rounds.rows import CLOCK, JOULES_SO_FAR, Row

MOST_CHANGES = 5000


def choose_fleet(options: RunOptions) -> Fleet | None:
    """The run's fleet; None: it has no clock. Raises UsageError for options that need one: on a federation replies arrive in real
    time, in which a merge may be due as well."""
    real = options.engine == "flower"
    needing = {
        "--deadline": options.deadline and not (real and options.schedule == "semi"), "--over-select": options.over_select > 1,
        f"--schedule {options.schedule}": options.schedule != "sync" and not real,
    }  # fmt: skip
    if options.fleet is None:
        for flag in (flag for flag, used in needing.items() if used):
            real_ones = ", or have replies really arrive: hfl federate" if flag.startswith("--schedule") else ""
            raise UsageError(f"{flag} needs simulated time: give a fleet with --fleet (hfl fleets lists them){real_ones}")
    refuse_unscheduled(options)
    return None if options.fleet is None else find_fleet(options.fleet)


def refuse_unscheduled(options: RunOptions) -> None:
    """Raises UsageError for options that do not go with the run's --schedule."""
    schedule = options.schedule
    if options.buffer is not None and schedule != "fedbuff":
        raise UsageError(f"--buffer is for --schedule fedbuff, not {schedule}")
    if schedule != "sync" and options.over_select > 1:
        raise UsageError(f"--over-select is for --schedule sync: under {schedule} nobody is waited for")
    if schedule == "semi" and options.deadline is None:
        raise UsageError("--schedule semi merges every --deadline seconds: give one")
    if options.buffer is not None and options.buffer < options.min_clients:
        raise UsageError(f"--buffer {options.buffer} is fewer than the {options.min_clients} replies of --min-clients")


@dataclass(eq=False)
class Turn:
    """A client's part in a round: what it would spend, how long it can (`limit`), and why it is not merged (`fate`; "": it is)."""

    assignment: Assignment
    device: Device
    work: Work
    spent: Spent
    limit: float
    fate: str = ""

    @property
    def client(self) -> int:
        return self.assignment.client.id


class Clock:
    """Simulated time of a run: `now` in seconds since its begin. `examples` are each client's."""

    def __init__(self, fleet: Fleet, options: RunOptions, examples: Sequence[int]) -> None:
        self.options, self.examples, self.now, self.joules = options, examples, 0.0, 0.0
        self._fleet, self._when, self._devices = fleet, fleet.when(options.seed), dict[int, Device]()

    def set(self, last: Row) -> None:
        """To the end of the `last` row of metrics.csv, which is empty before round 1."""
        self.now, self.joules = float(last.get(CLOCK, 0.0)), float(last.get(JOULES_SO_FAR, 0.0))

    def device(self, client: int) -> Device:
        """The client's device."""
        if client not in self._devices:
            self._devices[client] = self._fleet.device(client, len(self.examples), self.options.seed)
        return self._devices[client]

    def find_ready(self, busy: Collection[int] = ()) -> list[int]:
        """The clients that are there, without the `busy`; where nobody is busy and they are fewer than --min-clients, the clock
        first goes on until they are not.

        Raises RunError where that takes MOST_CHANGES comings and goings.
        """
        everyone, when = [i for i in range(len(self.examples)) if i not in busy], self._when
        need = 0 if busy else self.options.min_clients
        if when is None:
            return everyone
        began = self.now
        for _ in range(MOST_CHANGES):
            if len(ready := [i for i in everyone if when.is_ready(i, self.now)]) >= need:
                return ready
            self.now = min(when.next_change(i, self.now) for i in everyone)
        hours = (self.now - began) / 3600
        raise RunError(f"in {hours:,.0f} hours of simulated time no {need} clients of the fleet were there at once (--min-clients)")

    def stay(self, client: int, most: float) -> float:
        """Seconds that a client that is there will stay, or `most`."""
        ends = self._when.next_change(client, self.now, self.now + most) if self._when else math.inf
        return ends - self.now if ends < self.now + most else most


def judge(turn: Turn, options: RunOptions) -> None:
    """Says why the client is not merged, where it does not fit its device or does not end in time."""
    device, work = turn.device, turn.work
    if work.cost.memory > device.memory:
        turn.fate = f"memory: {work.cost.memory:,} of {device.memory:,.0f} bytes that training may use of {device.what}"
        turn.limit = 0.0
        return
    if turn.spent.seconds > turn.limit and options.on_deadline == "partial":
        steps = device.fitting_steps(work, turn.limit)
        if 0 < steps < work.steps:
            turn.assignment.steps = steps
            turn.work = replace(work, steps=steps, examples=work.examples * steps / work.steps)
            turn.spent = device.spend(turn.work)
    if turn.spent.seconds > turn.limit:
        late = turn.limit == options.deadline
        turn.fate = f"{'late' if late else 'it left'}: {turn.spent.seconds:.4g} of {turn.limit:.4g} s"
