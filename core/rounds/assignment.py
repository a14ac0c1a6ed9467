"""Who takes part in a round, and what each client is sent."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from hetfl.config import RunOptions
from hetfl.errors import NotApplicable, RunError, UsageError
from hetfl.hooks.server import Server
from hetfl.hooks.values import Client, Exchange
from hetfl.models.state import State
from hetfl.profiling.node import Profile
from hetfl.rounds.messages import LONGEST_LINE, NO_ANSWER, Assignment, Failure, exchange
from hetfl.rounds.receiving import leave_out
from hetfl.rounds.state import RoundState, RunState
from hetfl.submodel import encoding
from hetfl.submodel.blocks import is_leading
from hetfl.submodel.plan import Plan, Selection

LEAST_WIDTH = 1e-4  # that a device may claim
EVERYTHING = Exchange()  # what travels where no plugin says


def sample_clients(now: RoundState) -> list[int]:
    """The clients of the round, chosen of those that are there and have nothing under way; the server notes how many of how many
    they are.

    Where not every client had the same chance they count as all that there are: privacy is not amplified by such a choice.
    """
    run, server = now.run, now.run.server
    server.averages = run.plugins.averages
    busy = {*run.underway, *run.at_work}
    there = run.clock.find_ready(busy) if run.clock else [client for client in range(run.clients) if client not in busy]
    server.wanted = math.ceil(sample_size(run.clients, run.options.fraction) * run.options.over_select - 1e-9) - len(busy)
    if not there or server.wanted < 1:
        return []
    chosen = run.plugins.sample(server, [recall_client(run, client) for client in there], now.number)
    uniform = run.clock is None and run.plugins.samples_uniformly
    server.sampled, server.population = len(chosen), run.clients if uniform else len(chosen)
    return chosen


def recall_client(run: RunState, client: int) -> Client:
    """A client as it was when it last took part; one that never did, with the whole width."""
    known = run.server.clients.get(client)
    profile = known.profile if known else Profile()
    return Client(client, profile, run.extras.get(client, {}), run.last_round.get(client, 0), run.history.latest.get(client, {}))


def sample_size(clients: int, fraction: float) -> int:
    """How many clients take part in a round."""
    return max(1, math.ceil(fraction * clients - 1e-9))


def profile_clients(now: RoundState, chosen: Sequence[int]) -> list[Client]:
    """Asks each client what its device affords; one that does not say is left out.

    Raises RunError where nobody says it in round 1.
    """
    run, profiles = now.run, dict[int, Profile]()
    for client, answer in exchange(now.engine, "profile", dict.fromkeys(chosen, now.number)):
        checked = check_profile(answer, run.plugins.declared_widths, run.options.global_width)
        if isinstance(checked, Failure):
            leave_out(now, client, f"its profile: {checked.reason}", answer)
        else:
            profiles[client] = checked
    if now.number == 1 and not profiles:
        first = now.row.clients[chosen[0]].fault.replace("its profile: ", "", 1)
        raise RunError(f"no client can take part; the profile of client {chosen[0]}: {first}")
    able = [replace(recall_client(run, client), profile=profile) for client, profile in profiles.items()]
    found = allot_widths(run, able, now.number) if "allot" in run.plugins.answered else able
    run.server.clients |= {client.id: client for client in found}
    if now.number == 1 and found:
        describe_fleet(now, able)
    return found


def check_profile(answer: Any, declared: Collection[float] | None = None, global_width: float = 1.0) -> Profile | Failure:
    """What a device can afford, or why that is not known; `declared` are the widths that it may say (None: any).

    Where the run's own model is narrower, they may be shares of the whole model, as those of levels are.
    """
    if isinstance(answer, Failure):
        return answer
    if not isinstance(answer, Profile):
        return Failure(NO_ANSWER)
    if not isinstance(answer.width, int | float) or not LEAST_WIDTH <= answer.width <= 1:
        return Failure(f"a width of {answer.width!s:.20} is not in (0, 1], or too small for any model")
    allowed = [*(declared or ()), *(min(1.0, width / global_width) for width in declared or ())]
    if declared is not None and not any(math.isclose(answer.width, width) for width in allowed):
        return Failure(f"a width of {answer.width:g} is not among those of the run ({', '.join(f'{w:g}' for w in declared)})")
    if not isinstance(answer.bottleneck, str):
        return Failure(f"what keeps it from more is {type(answer.bottleneck).__name__}, no text")
    return replace(answer, bottleneck=answer.bottleneck[:LONGEST_LINE])


def allot_widths(run: RunState, clients: Sequence[Client], round: int) -> list[Client]:
    """The clients with the widths that the server allots them; who gets less than it affords is noted to be bound by that."""
    widths = run.plugins.allot(run.server, clients, round)
    return [
        replace(c, profile=Profile(w, f"allotted {w:.4g} of {c.profile.width:g}")) if w < c.profile.width else c
        for c, w in zip(clients, widths, strict=True)
    ]


def describe_fleet(now: RoundState, clients: Sequence[Client]) -> None:
    """Says which widths the clients of round 1 afford, and where all were asked, that nobody affords the whole model."""
    run, widths = now.run, Counter(client.profile.width for client in clients)
    shown = ", ".join(f"{width:g} with {count}" for width, count in sorted(widths.items(), reverse=True))
    run.callback.fact(f"widths: {shown} of the {len(clients)} clients of round 1 (profile {run.options.profile})")
    if max(widths) < 1 and len(clients) == run.clients:
        run.callback.note(
            f"no client affords the whole model: the widest of the {len(clients)} has width {max(widths):g}; channels beyond it "
            "are never trained where all clients get the leading ones"
        )


def assign_submodels(now: RoundState, clients: Sequence[Client]) -> dict[int, Assignment]:
    """What each client is sent: its plan's part of the model, and the extras of the plugins. A client without a plan sits out."""
    run = now.run
    clients, plans = extract_plans(now, clients) if clients else (clients, [])
    refuse_uncut(run.server, clients, plans)
    refuse_scattered(run.server, plans)
    found = {client.id: assign(now, client, plan) for client, plan in zip(clients, plans, strict=True) if plan is not None}
    if "client_extras" in run.plugins.answered:
        for assignment in found.values():
            assignment.extras = run.plugins.client_extras(run.server, assignment.client, assignment.plan, now.number)
    return encode_downloads(now, found) if "encode_down" in run.plugins.answered else found


def encode_downloads(now: RoundState, assignments: dict[int, Assignment]) -> dict[int, Assignment]:
    """The assignments with their tensors as the plugins make them travel, once for all clients that are sent the same."""
    run, known = now.run, dict[tuple[int, tuple[str, ...]], tuple[State, State]]()
    for assignment in assignments.values():
        names, masks = encoding.list_updated(assignment.travels), assignment.plan.masks
        key = id(assignment.state), tuple(names)
        if names and key not in known:
            state = encoding.select_existing({name: assignment.travels[name] for name in names}, masks)
            encoded = run.plugins.encode_down(run.server, state, now.number)
            arrived = run.plugins.decode_down(encoded, state, now.number)
            known[key] = encoded, encoding.fill_masked(arrived, {n: masks[n] for n in names if n in masks})
        assignment.encoded, assignment.arrived = known.get(key, ({}, {}))
    return assignments


def extract_plans(now: RoundState, clients: Sequence[Client]) -> tuple[Sequence[Client], list[Plan | None]]:
    """The clients and their plans; where the extraction fails on what single clients said before, those are left out."""
    run = now.run
    try:
        return clients, run.plugins.extract(run.server, clients, now.number)
    except Exception as error:
        if isinstance(error, UsageError) or (isinstance(error, RunError) and error.__cause__ is None):
            raise  # a sentence of the plugin's own
        faults = {client.id: fault for client in clients if (fault := extraction_fault(now, client))}
        good = [client for client in clients if client.id not in faults]
        if not faults or not good:
            raise
    for client, fault in faults.items():
        leave_out(now, client, f"no submodel could be extracted for it: {fault}")
    return good, run.plugins.extract(run.server, good, now.number)


def extraction_fault(now: RoundState, client: Client) -> str:
    """What the extraction raises for this client alone; "" where it raises nothing."""
    try:
        now.run.plugins.extract(now.run.server, [client], now.number)
    except Exception as error:
        cause = error.__cause__ or error
        return f"{type(cause).__name__}: {cause}"
    return ""


def assign(now: RoundState, client: Client, plan: Plan) -> Assignment:
    """The part of the global model, or of the client's own branch, that `plan` takes for this client as it is now."""
    run, answered = now.run, now.run.plugins.answered
    source = run.plugins.base_state(run.server, client) if "base_state" in answered else run.server.state
    state = now.take(plan, source)
    agreed = run.plugins.exchange(run.server, client, tuple(state)) if "exchange" in answered else EVERYTHING
    sent = {name: t for name, t in state.items() if agreed.down is None or name in agreed.down}
    personal = len(sent) < len(state) or source is not run.server.state
    travels = {name: t for name, t in sent.items() if name not in run.at_home}
    up = frozenset(state if agreed.up is None else (name for name in state if name in agreed.up))
    lasting = None if agreed.lasting is None else frozenset(agreed.lasting)
    return Assignment(client, plan, source, state, travels, up, personal, lasting)


def renew_assignments(now: RoundState) -> None:
    """Assigns the same plans to the same clients anew, of the model as it is now."""
    now.assignments = {i: assign(now, a.client, a.plan) for i, a in now.assignments.items()}


def passing(now: RoundState, assignment: Assignment, source: State) -> Assignment:
    """The same plan's part of `source`, whatever the client was sent."""
    return replace(assignment, source=source, travels=now.take(assignment.plan, source))


def refuse_uncut(server: Server, clients: Sequence[Client], plans: Sequence[Plan | None]) -> None:
    """Where nothing can be cut, a narrower client would train the whole model."""
    whole = any(p is not None and p.model is None and not p.masks for p in plans)
    if not server.widths.groups and whole and any(c.profile.width < 1 for c in clients):
        why = "; ".join(f"{name}: {reason}" for name, reason in list(server.widths.frozen.items())[:3])
        raise UsageError(f"no width of this model can be cut ({why}), so only --levels 1 is possible with it")


def refuse_scattered(server: Server, plans: Sequence[Plan | None]) -> None:
    """A frozen base is not sent: every node cuts its own by the numbers of units alone, so it can only keep the leading ones."""
    base, axes = server.builder.base, server.widths.axes
    cut = {name: frozenset[str]().union(*(axis.present for axis in axes.get(name, {}).values())) for name in base}
    for plan in {id(p): p for p in plans if isinstance(p, Selection)}.values() if base else ():
        scattered = {group for group, units in plan.kept.items() if not is_leading(units)}
        if name := next((name for name, groups in cut.items() if groups & scattered), None):
            raise NotApplicable(
                f"not applicable: the frozen base is not sent, so a node can cut it to leading channels alone, and this extraction "
                f"keeps others of '{name}'; take one that keeps the leading ones, or cuts ranks alone (--extract loraranks)"
            )


def refuse_too_many(options: RunOptions, clients: int) -> None:
    """Raises UsageError where a round would need more replies than it has clients."""
    count = sample_size(clients, options.fraction)
    for flag, needed in (("--min-clients", options.min_clients), ("--buffer", options.buffer or 0)):
        if needed > count:
            raise UsageError(f"{flag} {needed} is more than the {count} clients of a round")
