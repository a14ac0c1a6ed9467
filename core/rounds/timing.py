"""A round in simulated time: who is merged, decided before anybody trains, and what the round took."""

from __future__ import annotations

import math
from dataclasses import replace

from hetfl.errors import RunError
from hetfl.profiling.device import Work
from hetfl.rounds.assignment import sample_size
from hetfl.rounds.clock import Clock, Turn, judge
from hetfl.rounds.messages import Assignment
from hetfl.rounds.receiving import begin_row
from hetfl.rounds.state import RoundState
from hetfl.rounds.validation import upload_bytes
from hetfl.training.task import Reply


def keep_in_time(now: RoundState, clock: Clock) -> None:
    """Decides before anybody trains who will be merged: as many as a round is to have, the first that fit their devices and end
    in time.

    A client's upload is taken to be as large as what it is sent to train. Under --on-deadline partial one that would be late does
    as many steps as it can. The others are left out of `now.assignments`. Raises RunError where nobody is left in round 1.
    """
    if not now.assignments:
        return
    run, wanted = now.run, sample_size(now.run.clients, now.run.options.fraction)
    sizes: dict[object, int] = {}
    turns = [make_turn(now, clock, assignment, sizes) for assignment in now.assignments.values()]
    for turn in turns:
        judge(turn, clock.options)
    arrived = sorted((t for t in turns if not t.fate), key=lambda t: (t.spent.seconds, t.client))
    for turn in arrived[wanted:]:
        turn.fate = f"not needed: {wanted} had arrived"
        turn.limit = arrived[wanted - 1].spent.seconds
    now.turns = {turn.client: turn for turn in turns}
    if now.number == 1 and not arrived:
        soonest = min(turns, key=lambda t: t.spent.seconds)
        nobody = f"no client of the fleet '{run.options.fleet}' gets through round 1"
        raise RunError(f"{nobody}; the fastest, client {soonest.client}: {soonest.fate}")
    for turn in turns:
        if turn.fate:
            row = now.row.clients[turn.client] = begin_row(now, turn.client)
            row.dropped, row.bytes_down = turn.fate, turn.work.bytes_down
            now.assignments.pop(turn.client)
    if not arrived and not run.underway:
        now.alarm(f"none of the {len(turns)} clients of the round got through in time; the global model stays as it was")


def make_turn(now: RoundState, clock: Clock, assignment: Assignment, sizes: dict[object, int]) -> Turn:
    """What the client would spend, and how long it can. `sizes`: of uploads, which clients of a plan have in common."""
    run, client, plan = now.run, assignment.client.id, assignment.plan
    examples, steps = run.options.count_work(clock.examples[client])
    if (key := (id(plan), id(assignment.state), assignment.up)) not in sizes:
        up = {name: t for name, t in assignment.state.items() if name in assignment.up - run.at_home}
        sizes[key] = upload_bytes(plan, Reply(up, 0))
    work = Work(run.meter.cost(plan.sizes, plan.model), steps, examples, assignment.bytes, sizes[key])
    device = clock.device(client)
    deadline = None if run.options.schedule == "semi" else run.options.deadline  # under semi who is late is merged later
    return Turn(assignment, device, work, device.spend(work), clock.stay(client, deadline or math.inf))


def time_reply(now: RoundState, client: int) -> float:
    """The simulated seconds that a client's part of the round took, now that it is known what it sent."""
    turn = now.turns[client]
    turn.spent = turn.device.spend(replace(turn.work, bytes_up=now.lines()[client].bytes_up))
    return turn.spent.seconds


def settle(now: RoundState, clock: Clock) -> None:
    """Puts the clock on and says in the rows what the round took: seconds and joules.

    What a client spends counts in the round that merges it.
    """
    lines = now.lines()
    for turn in now.turns.values():
        row = lines[turn.client]
        seconds = turn.spent.seconds if turn.fate else time_reply(now, turn.client)
        row.simulated, row.device = seconds, turn.device.name
    took = math.inf if now.ends is not None else find_duration(now, clock)
    for turn in now.turns.values():
        lines[turn.client].joules = (turn.device.spend(turn.work, min(turn.limit, took)) if turn.fate else turn.spent).joules
    spent = math.fsum(row.joules for row in now.row.clients.values() if row.joules is not None)
    clock.now, clock.joules = clock.now + took if now.ends is None else now.ends, clock.joules + spent
    now.row.simulated = (clock.now - now.began[1], spent, clock.now, clock.joules)
    if now.run.options.schedule != "sync":
        now.row.under_way = len(now.run.underway)


def find_duration(now: RoundState, clock: Clock) -> float:
    """Seconds of a synchronous round.

    It ends with the last reply that is merged where none is missing, or none is waited for any more; else at the deadline, or when
    the last of the others has left.
    """
    turns = now.turns.values()
    missing = [t for t in turns if t.fate and not t.fate.startswith(("not needed", "memory"))]
    full = any(t.fate.startswith("not needed") for t in turns)
    if missing and not full and clock.options.deadline is not None:
        return clock.options.deadline
    ends = [t.spent.seconds for t in turns if not t.fate] + ([] if full else [t.limit for t in missing])
    return max(ends, default=0.0)
