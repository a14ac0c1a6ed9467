"""When updates are merged: as a round's clients send them (sync), or once they have arrived, in simulated time (semi, fedbuff).

A client trains in the round that sends it a model. What has not arrived when the merge begins stays under way, as what it changed
of the model that it was sent, and is merged into the model of the round that it arrives in (FedBuff: Nguyen et al., AISTATS 2022).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from hetfl.aggregation.updates import Update
from hetfl.hooks.values import Coverage
from hetfl.models.state import State
from hetfl.rounds.assignment import recall_client, sample_size
from hetfl.rounds.clock import Clock
from hetfl.rounds.receiving import TooFewReplies
from hetfl.rounds.state import RoundState, RunState, Underway
from hetfl.rounds.timing import time_reply
from hetfl.submodel.blocks import take
from hetfl.submodel.encoding import STATISTICS, list_updated
from hetfl.submodel.plan import Patch


def take_arrivals(now: RoundState, updates: Iterable[Update]) -> Iterator[Update]:
    """The updates that this round merges, in client order: of its clients' and of those under way those that have arrived.

    That is by `now.ends`, the time of the merge, which is found here; the others stay under way. Raises TooFewReplies after the
    last where they are too few.
    """
    run, clock = now.run, now.run.clock
    assert clock is not None, "a schedule other than sync needs a fleet"
    fresh = {update.client: update for update in updates}
    arrivals = {client: clock.now + time_reply(now, client) for client in fresh}
    arrivals |= {client: each.arrives for client, each in run.underway.items()}
    now.ends, arrived = find_merge(now, clock, arrivals)
    covered = {each.client: each for each in now.coverage}
    now.coverage.clear()
    run.server.sampled = run.server.population = max(1, len(arrived))
    for client in sorted(fresh.keys() - set(arrived)):
        run.underway[client] = send_off(now, fresh.pop(client), arrivals[client], covered.pop(client, None))
    for client in arrived:
        if client in fresh:
            now.row.clients[client].staleness = 0
            update, cover = fresh.pop(client), covered.get(client)
        else:
            late = run.underway.pop(client)
            update, cover = bring_in(now, late), Coverage.of(late.update, late.more)
        now.coverage += [cover] if cover and "finalize" in run.plugins.answered else []
        yield update
    if len(arrived) < run.options.min_clients:
        raise TooFewReplies(len(arrived))


def find_merge(now: RoundState, clock: Clock, arrivals: Mapping[int, float]) -> tuple[float, list[int]]:
    """The simulated time of the merge and whom it takes, ascending, given when the clients' updates arrive.

    Under fedbuff the first --buffer, as soon as they are there; under semi those that are there --deadline after the round's begin,
    sooner where all are and later where they are not yet --min-clients.
    """
    options, order = now.run.options, sorted(arrivals, key=lambda client: (arrivals[client], client))
    if not order:
        return clock.now + max((t.limit for t in now.turns.values() if math.isfinite(t.limit)), default=0.0), []
    if options.schedule == "fedbuff":
        order = order[: find_buffer(now.run)]
        return max(clock.now, arrivals[order[-1]]), sorted(order)
    last, least = arrivals[order[-1]], arrivals[order[min(options.min_clients, len(order)) - 1]]
    ends = max(least, min(clock.now + (options.deadline or 0.0), last))
    return ends, sorted(client for client in order if arrivals[client] <= ends)


def find_buffer(run: RunState) -> int:
    """How many updates make a merge under fedbuff."""
    options = run.options
    return options.buffer or max(options.min_clients, math.ceil(sample_size(run.clients, options.fraction) / 2))


def send_off(now: RoundState, update: Update, arrives: float, cover: Coverage | None) -> Underway:
    """An update that will be merged later, as what its client changed, and the line of clients.csv that then is its."""
    source, row = now.assignments[update.client].source, now.row.clients.pop(update.client)
    values = {name: patch.values.cpu() for name, patch in update.patches.items()}
    moved = [name for name in list_updated(values) if name in source]
    values |= {name: values[name] - take(source[name], update.patches[name].index) for name in moved}
    patches = {name: replace(patch, values=values[name]) for name, patch in update.patches.items()}
    return Underway(replace(update, patches=patches), now.number, arrives, row, frozenset(moved), cover is not None and cover.more)


def bring_in(now: RoundState, late: Underway) -> Update:
    """An update that was under way as it is merged now: what its client changed, discounted, on the model as it is.

    Where it is the value that counts and not the change (running statistics), the model's is moved towards it as far.
    """
    run, client = now.run, late.update.client
    now.row.clients[client] = replace(late.row, round=now.number, staleness=now.number - late.round)
    discount = (1.0 + now.number - late.round) ** -run.options.staleness
    source = run.plugins.base_state(run.server, recall_client(run, client))
    patches = {name: rebase(name, p, source, discount, name in late.moved) for name, p in late.update.patches.items()}
    return replace(late.update, patches=patches)


def rebase(name: str, patch: Patch, source: State, discount: float, moved: bool) -> Patch:
    """The patch on the tensor of the `source` of now."""
    if name not in source or not (moved or name.endswith(STATISTICS)):
        return patch
    here = take(source[name], patch.index)
    return replace(patch, values=here + discount * (patch.values if moved else patch.values - here))
