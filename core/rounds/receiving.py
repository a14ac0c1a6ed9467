"""The replies of a round: asked for, checked as they come, and what becomes of clients that fail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hetfl.errors import RunError
from hetfl.hooks.values import Client, ReceivedReply
from hetfl.rounds.messages import LONGEST_LINE, Assignment, Failure, Instruction, exchange
from hetfl.rounds.rows import ClientRow
from hetfl.rounds.state import RoundState
from hetfl.rounds.validation import CheckedReply, ReplyValidator
from hetfl.training.task import Reply

MOST_NAMES = 128  # of metrics that the clients of a run may use


def receive_replies(now: RoundState) -> Iterator[ReceivedReply]:
    """Has the clients train, and gives the replies that can be used, in client order as they come.

    Waiting for clients is the time of phase "fit". A client that fails is left out, asked again or ends the run
    (--on-client-error).
    """
    run = now.run
    answers = exchange(now.engine, "train", {i: instruct(now, a) for i, a in now.assignments.items()})
    while True:
        with now.timed("fit"):
            client, answer = next(answers, (None, None))
            if client is None:
                return
            received = check_reply(now, client, answer)
            if received is None and run.options.on_client_error == "retry":
                again = dict(exchange(now.engine, "train", {client: instruct(now, now.assignments[client])}))
                received = check_reply(now, client, again[client])
        if received is not None:
            yield received


def instruct(now: RoundState, assignment: Assignment) -> Instruction:
    """What has the client train."""
    run = now.run
    version = run.state_versions.get(assignment.client.id, 0)
    sent = assignment.instruction(now.number, run.local_norms, version, train=True)
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
    row.examples, row.metrics, row.bytes_up, row.change = reply.examples, dict(reply.metrics), checked.bytes_up, checked.change
    as_now = Client(client, assignment.client.profile, reply.extras, now.number)
    now.assignments[client] = replace(assignment, client=as_now)
    run.extras[client], run.last_round[client], run.state_versions[client] = reply.extras, now.number, now.number
    return ReceivedReply(as_now, assignment.plan, assignment.state, reply)


def check_safely(now: RoundState, assignment: Assignment, answer: Any) -> CheckedReply:
    """The reply as the validator and the round's limits find it; what cannot even be checked is the client's fault too."""
    run = now.run
    try:
        checked = ReplyValidator(run.server, run.plugins, run.travelling, now.number).check(assignment, answer)
        if checked.fault is None:
            checked.reply = receive_reply(now, checked)
        checked.fault = checked.fault or now.limits.fault(checked.reply, checked.expected) or names_fault(now, checked.reply)
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
