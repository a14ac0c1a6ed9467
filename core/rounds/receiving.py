"""The replies of a round: asked for, checked as they come, recovered to updates, and what becomes of clients that fail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from hetfl.aggregation.updates import Update
from hetfl.errors import RunError, UsageError
from hetfl.hooks.values import Client, Coverage, ReceivedReply
from hetfl.rounds.messages import LONGEST_LINE, Assignment, Failure, Instruction, exchange
from hetfl.rounds.rows import ClientRow
from hetfl.rounds.state import RoundState
from hetfl.rounds.validation import CheckedReply, ReplyValidator, measure_change
from hetfl.training.task import Reply

MOST_NAMES = 128  # of metrics that the clients of a run may use


class TooFewReplies(RunError):  # noqa: N818 (not an error: the round keeps its model)
    """A round has fewer valid replies than --min-clients."""

    def __init__(self, count: int) -> None:
        self.count = count


def recover_updates(now: RoundState, replies: Iterable[ReceivedReply]) -> Iterator[Update]:
    """An update in global coordinates for each reply, in client order; where it lies is noted where a plugin has `finalize`.

    A client whose reply the plugin cannot recover is left out, where the plugin takes replies one by one.
    """
    run, arriving, pending = now.run, iter(replies), list[ReceivedReply]()

    def pull() -> Iterator[ReceivedReply]:
        for reply in arriving:
            pending.append(reply)
            yield reply

    while True:
        try:
            for update in now.timed_items("recover", run.plugins.recover(run.server, pull(), now.number)):
                note_coverage(now, update, pending)
                yield update
            return
        except (RunError, UsageError):
            raise
        except Exception as error:
            client = pending[0].client.id if len(pending) == 1 else None
            why = run.plugins.explain(error, "recover", now.number, client) or f"{type(error).__name__}: {error}"
            if client is None:
                raise RunError(f"the replies of round {now.number} could not be recovered: {why}") from error
            pending.clear()
            run.extras.pop(client, None)
            leave_out(now, client, f"its reply could not be recovered: {why}")


def note_coverage(now: RoundState, update: Update, pending: list[ReceivedReply]) -> None:
    """Notes where an update lies, without its values, and that its reply is dealt with."""
    of_client = next((r for r in pending if r.client.id == update.client), None)
    if "finalize" in now.run.plugins.answered:
        reply = of_client.reply if of_client else None
        more = reply is not None and bool(reply.extras or reply.kept or reply.masks)
        now.coverage.append(Coverage.of(update, more))
    if of_client is not None:
        pending.remove(of_client)


def receive_replies(now: RoundState) -> Iterator[ReceivedReply]:
    """Has the clients train, and gives the replies that can be used, in client order as they come.

    Waiting for clients is the time of phase "fit". A client that fails is left out, asked again or ends the run
    (--on-client-error). After the last, raises TooFewReplies where they were fewer than --min-clients: whoever gathers them stops.
    """
    run, count = now.run, 0
    run.callback.phase(now.number, "fit")
    for reply in now.timed_items("fit", ask_to_train(now)):
        count += 1
        yield reply
    run.callback.phase(now.number, "aggregate")
    if count < run.options.min_clients and run.options.schedule == "sync":
        raise TooFewReplies(count)


def ask_to_train(now: RoundState) -> Iterator[ReceivedReply]:
    """The usable replies of all clients that were assigned a submodel; one that fails is asked twice under "retry"."""
    for client, answer in exchange(now.engine, "train", {i: instruct(now, a) for i, a in now.assignments.items()}):
        received = check_reply(now, client, answer)
        if received is None and now.run.options.on_client_error == "retry":
            again = dict(exchange(now.engine, "train", {client: instruct(now, now.assignments[client])}))
            received = check_reply(now, client, again[client])
        if received is not None:
            yield received


def instruct(now: RoundState, assignment: Assignment) -> Instruction:
    """What has the client train."""
    run = now.run
    version = run.state_versions.get(assignment.client.id, 0)
    sent = assignment.instruction("train", now.number, run.local_norms, version)
    more = sum(extra.elements * extra.dtype.itemsize for extra in run.plugins.extras_up.values())
    return replace(sent, most_bytes=(sent.most_bytes or 0) + more)


def check_reply(now: RoundState, client: int, answer: Any) -> ReceivedReply | None:
    """A client's reply if it can be used; otherwise the client is left out, with the reason in the run folder."""
    run = now.run
    sent = now.assignments[client]
    checked = check_safely(now, sent, answer)
    assignment, reply = checked.assignment, checked.reply
    row = now.row.clients[client] = begin_row(now, client)
    row.bytes_down = sent.bytes
    if checked.fault:
        leave_out(now, client, checked.fault, answer)
        return None
    row.examples, row.metrics, row.bytes_up = reply.examples, dict(reply.metrics), checked.bytes_up
    row.change = checked.change.whole
    as_now = Client(client, assignment.client.profile, reply.extras, now.number)
    now.assignments[client] = replace(assignment, client=as_now)
    run.extras[client], run.last_round[client], run.state_versions[client] = reply.extras, now.number, now.number
    return ReceivedReply(as_now, assignment.plan, assignment.state, reply)


def check_safely(now: RoundState, assignment: Assignment, answer: Any) -> CheckedReply:
    """The reply as the validator and the round's limits find it; what cannot even be checked is the client's fault too."""
    run = now.run
    try:
        checked = ReplyValidator(run.server, run.plugins, run.at_home, now.number).check(assignment, answer)
        if checked.fault is None:
            reply = receive_reply(now, checked) if "receive" in run.plugins.answered else checked.reply
            change = checked.change if reply is checked.reply else measure_change(reply.state, checked.expected)
            checked.reply, checked.fault = reply, now.limits.fault(reply, change) or names_fault(now, reply)
    except Exception as error:
        return CheckedReply(assignment, Reply({}, 0), f"its reply cannot be read: {type(error).__name__}: {error}"[:LONGEST_LINE])
    return checked


def names_fault(now: RoundState, reply: Reply) -> str | None:
    """Why its metrics are not taken in: they would make the tables wider than a run's may be; or None."""
    known = now.run.metric_names | reply.metrics.keys()
    if len(known) > MOST_NAMES and known > now.run.metric_names:
        return f"its metrics have new names, and the run's clients have used {len(now.run.metric_names)} of {MOST_NAMES} already"
    now.run.metric_names = known
    return None


def receive_reply(now: RoundState, checked: CheckedReply) -> Reply:
    """The checked reply as the plugins would have it count."""
    sent = checked.assignment
    client = replace(sent.client, extras=checked.reply.extras, last_round=now.number)
    received = ReceivedReply(client, sent.plan, sent.state, checked.reply)
    return now.run.plugins.receive(now.run.server, received, now.number).reply


def leave_out(now: RoundState, client: int, fault: str, answer: Any = None) -> None:
    """Leaves a client out of the round, and says so; what it keeps is as if it had not been asked.

    Raises RunError where the run is not to go on without it.
    """
    run, row = now.run, now.row.clients.setdefault(client, begin_row(now, client))
    row.fault, row.traceback = fault, answer.details if isinstance(answer, Failure) else ""
    run.last_round[client], run.state_versions[client] = 0, now.versions.get(client, 0)
    now.engine.revert(client)
    if run.options.on_client_error == "fail":
        raise RunError(f"client {client} failed in round {now.number}: {fault} (--on-client-error fail)")
    run.callback.note(f"round {now.number}: client {client} left out: {fault}")


def begin_row(now: RoundState, client: int) -> ClientRow:
    """The beginning of a client's line in clients.csv."""
    row = ClientRow(now.number, client)
    if (assignment := now.assignments.get(client)) is not None:
        row.level, row.bottleneck = assignment.client.profile.level, assignment.client.profile.bottleneck
    return row
