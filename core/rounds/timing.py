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
    if not arrived:
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
    return Turn(assignment, device, work, device.spend(work), min(clock.options.deadline or math.inf, clock.stay(client)))


def settle(now: RoundState, clock: Clock) -> None:
    """Puts the clock on and says in the rows what the round took: seconds and joules.

    It ends with the last reply that is merged where none is missing, or none is waited for any more; else at the deadline, or when
    the last of the others has left.
    """
    kept = [turn for turn in now.turns.values() if not turn.fate]
    for turn in kept:
        turn.spent = turn.device.spend(replace(turn.work, bytes_up=now.row.clients[turn.client].bytes_up))
    missing = [t for t in now.turns.values() if t.fate and not t.fate.startswith(("not needed", "memory"))]
    full = any(t.fate.startswith("not needed") for t in now.turns.values())
    ends = [t.spent.seconds for t in kept] + ([] if full else [t.limit for t in missing])
    took = max(ends, default=0.0)
    if missing and not full and clock.options.deadline is not None:
        took = clock.options.deadline
    spent = 0.0
    for turn in now.turns.values():
        row = now.row.clients[turn.client]
        joules = turn.spent.joules if not turn.fate else turn.device.spend(turn.work, min(turn.limit, took)).joules
        row.simulated, row.joules, row.device = turn.spent.seconds, joules, turn.device.name
        spent += joules
    clock.now, clock.joules = clock.now + took, clock.joules + spent
    now.row.simulated = (clock.now - now.began[1], spent, clock.now, clock.joules)
