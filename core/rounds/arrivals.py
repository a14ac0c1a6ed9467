"""When updates are merged on a real federation: as they really arrive (--schedule semi and fedbuff without --fleet).

A client that has not answered when a merge begins stays at work and is asked nothing else. Its reply is merged in the round in
which it arrives, as what it changed of the model that it was sent (schedule.py); it has new work from the next round on. Who
arrives when does not follow from the seed. What is at work when a run ends is dropped: a run that goes on has new work for all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import cast

from hetfl.aggregation.updates import Update
from hetfl.hooks.values import Coverage, ReceivedReply
from hetfl.rounds.messages import Failure, PostalEngine
from hetfl.rounds.receiving import TooFewReplies, check_reply, instruct, recover_updates
from hetfl.rounds.schedule import bring_in, find_buffer, send_off
from hetfl.rounds.state import RoundState

PAUSE = 0.2  # seconds between two looks for answers


def take_answers(now: RoundState) -> Iterator[Update]:
    """The updates that this round merges, in client order: of its clients' and of those at work those that have come.

    Raises TooFewReplies after the last where they are too few.
    """
    run = now.run
    run.callback.phase(now.number, "fit")
    with now.timed("fit"):
        received = receive_answers(now)
    run.callback.phase(now.number, "aggregate")
    updates = {u.client: u for u in recover_updates(now, [r for then, r in received.values() if then is now])}
    for client in updates:
        now.row.clients[client].staleness = 0
    for then, reply in received.values():
        if then is not now:
            updates |= {update.client: update for update in recover_late(now, then, reply)}
    leave_at_work(now)
    run.server.sampled = run.server.population = max(1, len(updates))
    for client in sorted(updates):
        yield updates[client]
    if len(updates) < run.options.min_clients:
        raise TooFewReplies(len(updates))


def receive_answers(now: RoundState) -> dict[int, tuple[RoundState, ReceivedReply]]:
    """Has the clients train, and waits until the merge is due: the replies that can be used, by client, and the rounds they are of.

    Under "retry" a client that fails is asked once more, and is at work until it answers that.
    """
    run, engine, found, again = now.run, cast(PostalEngine, now.engine), dict[int, tuple[RoundState, ReceivedReply]](), set[int]()
    engine.send("train", {client: instruct(now, assignment) for client, assignment in now.assignments.items()})
    run.at_work |= dict.fromkeys(now.assignments, now)
    while run.at_work and not is_due(now, len(found)):
        for client in await_answers(now, engine, len(found)):
            then = run.at_work[client]
            reply = check_reply(then, client, run.mail.pop(client))
            if reply is None and run.options.on_client_error == "retry" and client not in again:
                again.add(client)
                del then.row.clients[client]  # it is at work, and not left out
                engine.send("train", {client: instruct(then, then.assignments[client])})
                continue
            del run.at_work[client]
            if then is not now:
                now.assignments[client] = then.assignments[client]
            if reply is not None:
                found[client] = then, reply
            elif then is not now:
                say_late_fault(now, then, client)
    return dict(sorted(found.items()))


def await_answers(now: RoundState, engine: PostalEngine, have: int) -> list[int]:
    """The clients whose answers are to be looked at now, ascending: as many as make the merge due beside those that the round
    has, the first to come, and all that failed."""
    run = now.run
    while True:
        run.mail |= dict(engine.collect())
        failed = [client for client, answer in run.mail.items() if isinstance(answer, Failure)]
        good = [client for client in run.mail if client not in failed]
        if is_due(now, have + len(good)) or run.mail.keys() >= run.at_work.keys():
            wanted = find_buffer(run) - have if run.options.schedule == "fedbuff" else len(good)
            return sorted(failed + good[:wanted])
        time.sleep(PAUSE)


def is_due(now: RoundState, count: int) -> bool:
    """Whether a merge of `count` updates is to begin: under fedbuff of --buffer; under semi of what is there --deadline seconds
    after the round's begin, and of --min-clients at least."""
    options = now.run.options
    if options.schedule == "fedbuff":
        return count >= find_buffer(now.run)
    return count >= options.min_clients and time.perf_counter() - now.began[0] >= (options.deadline or 0.0)


def say_late_fault(now: RoundState, then: RoundState, client: int) -> None:
    """Has the line of a client that is left out of round `then` stand in the round that notices it."""
    now.row.clients[client] = replace(then.row.clients[client], round=now.number)


def recover_late(now: RoundState, then: RoundState, reply: ReceivedReply) -> Iterator[Update]:
    """The update of a reply to round `then` as it is merged now; none where it cannot be recovered."""
    for update in recover_updates(then, [reply]):
        late = send_off(then, update, 0.0, then.coverage.pop() if then.coverage else None)
        now.coverage += [Coverage.of(late.update, late.more)] if "finalize" in now.run.plugins.answered else []
        yield bring_in(now, late)
    if reply.client.id not in now.row.clients:
        say_late_fault(now, then, reply.client.id)


def leave_at_work(now: RoundState) -> None:
    """Takes the clients that have not answered out of the round, which is then over for it; what they were sent stays at hand."""
    run = now.run
    rest = RoundState(run, now.number, now.engine)
    rest.versions, rest.limits = now.versions, now.limits
    rest.assignments = {client: a for client, a in now.assignments.items() if run.at_work.get(client) is now}
    run.at_work |= dict.fromkeys(rest.assignments, rest)
    now.assignments = {client: a for client, a in sorted(now.assignments.items()) if client not in rest.assignments}
    now.row.under_way = len(run.at_work)
