"""Batch norm's statistics after aggregation, where the policy is not to average them (docs/norms.md; spec heterofl 2.4)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from hetfl.aggregation.mean import mean
from hetfl.aggregation.updates import Update, Updates
from hetfl.errors import UsageError
from hetfl.hooks.values import ReceivedReply
from hetfl.models.normalization import measure_statistics
from hetfl.models.state import State
from hetfl.rounds.assignment import passing
from hetfl.rounds.limits import find_negative_variance
from hetfl.rounds.messages import Assignment, Failure, exchange
from hetfl.rounds.rows import STATISTICS_BYTES
from hetfl.rounds.state import RoundState
from hetfl.rounds.validation import number_fault, reply_fault
from hetfl.submodel import encoding
from hetfl.submodel.encoding import MEAN, VARIANCE
from hetfl.submodel.plan import Plan, Selection
from hetfl.training.task import Reply

EXTREME = 1000.0  # times the middle client's


def choose_norm_policy(given: str, wanted: str | None, public: bool) -> str:
    """The policy for normalisation statistics: as given, else what a plugin asks for, else averaging.

    Raises UsageError where it needs public data that the server lacks.
    """
    chosen = (wanted or "aggregate") if given == "auto" else given
    if chosen in ("recalibrate", "local") and not public:
        raise UsageError(
            f"--norm-policy {chosen} needs public data on the server, for the global model's own statistics; "
            "give it some with --server-data 0.05"
        )
    return chosen


def renew_statistics(now: RoundState) -> None:
    """Gives the new global model its normalisation statistics; under the policy "aggregate", which averages them, says in round 1
    where that is over models of several widths."""
    run = now.run
    if run.norm_policy == "aggregate":
        if now.number == 1:
            warn_of_mixed_widths(now, run.running_names)
        return
    with now.phase("statistics"):
        found = pool_passes(now) if run.static_norms else measure_on_server(now)
    run.server.state = {**run.server.state, **{name: found[name] for name in run.running_names if name in found}}


def warn_of_mixed_widths(now: RoundState, names: Sequence[str]) -> None:
    """Says that narrower models are tested with statistics that are not theirs, where clients of several widths send these."""
    plans = [a.plan for a in now.assignments.values() if isinstance(a.plan, Selection) and not a.up.isdisjoint(names)]
    if len({tuple(plan.sizes.items()) for plan in plans}) > 1:
        now.run.callback.note(
            "batch norm's statistics are averaged over models of several widths, so narrow ones are tested with statistics that "
            "are not theirs, which can take them down to chance; --norm-policy static gives each its own (docs/norms.md)"
        )


def pool_passes(now: RoundState) -> State:
    """The global model's statistics on the data of the round's clients: each passes its examples through the whole network, which
    it is sent for that, or under "static-slices" through its own part of it. What travels is counted."""
    server, slices = now.run.server, now.run.norm_policy == "static-slices"
    whole = server.select(torch.arange)
    ours = {i: a if slices else replace(a, plan=whole) for i, a in now.assignments.items() if a.plan.model is None}
    asked = {i: passing(now, a, server.state) for i, a in ours.items()}
    replies = collect_statistics(now, asked, now.number)
    now.passes = replies if slices else []
    sent = {i: encoding.payload_bytes(a.travels, a.plan.masks) for i, a in asked.items()}
    received = {r.client.id: encoding.payload_bytes(r.reply.state) for r in replies}
    for client, row in now.row.clients.items():
        row.bytes_down += sent.get(client, 0)
        row.bytes_up += received.get(client, 0)
    now.row.facts[STATISTICS_BYTES] = sum(sent.values()) + sum(received.values())
    return pool_statistics(replies, server.state)


def needs_own_statistics(plan: Plan, personal: bool = False) -> bool:
    """Whether the submodel of `plan` is a network of its own under the policies STATIC, so that the global network's statistics are
    far off for it: fewer channels feed each of its own, or weights other than the global ones do (`personal`)."""
    return isinstance(plan, Selection) and (personal or not plan.whole)


def own_statistics(now: RoundState, plan: Plan, source: State, number: int) -> State:
    """`source`, the global model after round `number`, with statistics of the very submodel that `plan` takes of it, pooled over
    the clients of the round that have this plan, or over all where nobody has. This is for evaluation: no bytes are counted.

    What was found a round ago, or in this one's pass through the clients' own parts, is not asked for again.
    """
    run = now.run
    able = {i: replace(a, plan=plan) for i, a in now.assignments.items() if a.plan.model is None}
    having = {i: a for i, a in now.assignments.items() if a.plan is plan} or able
    key = id(plan), id(source), number, *having
    if key not in run.own_statistics:
        with now.timed("statistics"):
            passed = [r for r in now.passes if r.plan is plan] if source is now.aggregated else []
            if {r.client.id for r in passed} != {*having}:
                passed = collect_statistics(now, {i: passing(now, a, source) for i, a in having.items()}, number)
            run.own_statistics[key] = plan, source, pool_statistics(passed, source)
    return run.own_statistics[key][2]


def collect_statistics(now: RoundState, asked: Mapping[int, Assignment], number: int) -> list[ReceivedReply]:
    """The clients' statistics of what they are `asked`, on batches drawn for round `number`; a client that gives none, for lack of
    memory say, is left out of them."""
    versions, received = now.run.state_versions, list[ReceivedReply]()
    names = set(now.run.running_names)
    instructions = {i: a.instruction("statistics", number, now.run.local_norms, versions.get(i, 0)) for i, a in asked.items()}
    for client, answer in exchange(now.engine, "statistics", instructions):
        sent = asked[client]
        reply = check_statistics({name: t for name, t in sent.travels.items() if name in names}, answer)
        if reply is None:
            why = answer.reason if isinstance(answer, Failure) else "they are not what was asked for"
            now.run.callback.note(f"round {now.number}: client {client} left out of the statistics: {why}")
        elif reply.examples:
            received.append(ReceivedReply(sent.client, sent.plan, {}, reply))
    return leave_out_extremes(now, received)


def check_statistics(expected: State, answer: Any) -> Reply | None:
    """Normalisation statistics, in the shapes of `expected`; None where there are none to be used."""
    usable = isinstance(answer, Reply) and not (number_fault(answer) or reply_fault(answer, expected, {}))
    return answer if isinstance(answer, Reply) and usable else None


def pool_statistics(replies: Sequence[ReceivedReply], old: State) -> State:
    """`old` with the mean and variance of all clients' examples together, channel by channel over the clients that have it.

    The law of total variance: the mean of the clients' variances, and of their means' squared distances from the common mean.
    """
    updates = Updates([r.update() for r in replies], old)
    means, spread = mean(updates, updates.weights), list[Update]()
    for r in replies:
        found, center = r.reply.state, r.plan.take({name: means[name] for name in r.reply.state})
        apart = {name: found[name] - center[name] for name in found if name.endswith(MEAN)}
        total = {(n := name.removesuffix(MEAN) + VARIANCE): found[n] + d.square() for name, d in apart.items()}
        spread.append(replace(r, reply=replace(r.reply, state={**found, **total})).update())
    return mean(Updates(spread, old), updates.weights)


def measure_on_server(now: RoundState) -> State:
    """The statistics of the global model on the server's own examples."""
    server = now.run.server
    batches = server.public.tune.batches(server.options.eval_batch_size, server.stream("statistics", now.number))
    return measure_statistics(server.builder.load(server.state), batches)[0]


def leave_out_extremes(now: RoundState, received: list[ReceivedReply]) -> list[ReceivedReply]:
    """The passes without those whose statistics, or numbers of examples, are far beyond the middle one's, or negative variances."""
    found = []
    sizes = [max(float(t.abs().max()) for t in r.reply.state.values()) if r.reply.state else 0.0 for r in received]
    usual, examples = statistics.median(sizes or [0.0]), statistics.median([r.reply.examples for r in received] or [0])
    for r, size in zip(received, sizes, strict=True):
        if find_negative_variance(r.reply.state) or size > EXTREME * max(usual, 1.0) or r.reply.examples > EXTREME * examples:
            now.alarm(f"the normalisation statistics of client {r.client.id} are beyond belief and were left out")
        else:
            found.append(r)
    return found
