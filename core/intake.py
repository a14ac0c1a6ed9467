"""What comes back from clients, checked before any of it is believed: against the plan that was sent, and for what cannot be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import Message

from hetfl.core import payload
from hetfl.core.apps import Means
from hetfl.core.plans import Plan
from hetfl.core.roles import Roles
from hetfl.core.server import Server
from hetfl.core.types import Client, Profile, Reply
from hetfl.core.widths import State
from hetfl.core.wire import MalformedError

Row = dict[str, Any]
NOTHING = Reply({}, 0)
MOST_EXAMPLES = 1 << 40
MOST_METRICS = 64
MOST_TEXT, LONGEST = 20_000, 500  # characters of a traceback, and of a line
OURS = {"round", "client", "level", "bound by", "bytes down", "bytes up", "examples", "fault", "traceback", "parameters", "MACs",
        "memory", "change"}  # fmt: skip


@dataclass(eq=False)
class Sent:
    """What one client was sent this round."""

    client: Client
    plan: Plan
    source: State  # what the plan was taken from
    state: State
    travels: State  # of `state`, what crosses the network
    up: frozenset[str]  # the tensors that are to come back
    personal: bool  # whether its model is not just a part of the global one
    extras: State = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return payload.size(self.travels, self.plan.masks) + payload.size(self.extras)


@dataclass(eq=False)
class Taken:
    """A reply as it was taken in: what was sent, narrowed to what came back, and the `fault` that makes it unusable."""

    sent: Sent
    reply: Reply = NOTHING
    fault: str | None = None
    row: Row = field(default_factory=dict)


class Intake:
    """Checks messages of clients; `travels` leaves of a state what crosses the network."""

    def __init__(self, server: Server, roles: Roles, desk: Means, travels: Callable[[State], State]) -> None:
        self._server, self._roles, self._desk, self._travels = server, roles, desk, travels

    def take(self, sent: Sent, message: Message) -> Taken:
        """A reply to a training message."""
        if message.has_error():
            return Taken(sent, NOTHING, last_line(message), traced(message))
        reply, fault = self._read(message)
        if fault is None:
            sent, fault = self._narrowed(sent, reply)
        if fault is None:
            reply, fault = unpacked(reply, sent)
        if fault is None:
            expected = self._travels({name: t for name, t in sent.state.items() if name in sent.up})
            fault = bounds(reply) or payload.fault(reply, expected, self._roles.up)
        if fault is not None:
            return Taken(sent, NOTHING, fault)
        row = {"examples": reply.examples, **reply.metrics, "bytes up": upload(sent.plan, reply)}
        row["change"] = change(reply.state, expected)
        return Taken(sent, reply, None, row)

    def _read(self, message: Message) -> tuple[Reply, str | None]:
        found = self._opened(message)
        return (found, None) if isinstance(found, Reply) else (NOTHING, str(found))

    def _opened(self, message: Message) -> Any:
        """The payload, or why it cannot be read."""
        try:
            found = self._desk.open(message.content)
        except MalformedError as error:
            return str(error)
        return found if isinstance(found, Reply | Profile | dict) else "it is no answer to what was asked"

    def _narrowed(self, sent: Sent, reply: Reply) -> tuple[Sent, str | None]:
        """What was sent, as if it had been as narrow as what the client went on to train; or why that cannot be."""
        if not (reply.kept or reply.masks):
            return sent, None
        source = self._roles.source(self._server, sent.client)
        if reply.kept:
            if fault := payload.misfit(reply.kept, sent.plan.sizes):
                return sent, fault
            plan = sent.plan.narrow(reply.kept, {})
            sent = replace(sent, plan=plan, state=plan.take(source))
        if reply.masks:
            if fault := payload.unmasked(reply.masks, sent.plan.masks, sent.state):
                return sent, fault
            plan = sent.plan.narrow({}, reply.masks)
            sent = replace(sent, plan=plan, state=plan.take(source))
        return sent, None

    def profile(self, message: Message | None) -> Profile | str:
        """What a device can afford, or why that is not known."""
        if message is None:
            return "it gave no answer"
        if message.has_error():
            return last_line(message)
        found = self._opened(message)
        if not isinstance(found, Profile):
            return found if isinstance(found, str) else "it is no answer to what was asked"
        if not 0 < found.width <= 1:
            return f"a width of {found.width:g} is not in (0, 1]"
        return found if len(found.binding) <= LONGEST else replace(found, binding=found.binding[:LONGEST])

    def scores(self, message: Message) -> dict[str, float]:
        """What a client measured; empty where it did not or cannot be believed."""
        found = self._opened(message) if message.has_content() else {}
        usable = isinstance(found, dict) and "accuracy" in found and all(math.isfinite(v) for v in found.values())
        return dict(found) if usable else {}

    def statistics(self, expected: State, message: Message) -> Reply | None:
        """Normalisation statistics, in the shapes of `expected`; None where there are none to be used."""
        found = self._opened(message) if message.has_content() else None
        usable = isinstance(found, Reply) and not (bounds(found) or payload.fault(found, expected, {}))
        return found if isinstance(found, Reply) and usable else None


def change(state: State, before: State) -> float:
    """How far a client went: the norm of what it changed over the norm of what it began with."""
    pairs = [(t, before[n]) for n, t in state.items() if t.is_floating_point()]
    if not pairs:
        return 0.0
    now, was = (list(column) for column in zip(*pairs, strict=True))
    moved, size = (torch.stack(torch._foreach_norm(tensors)).norm() for tensors in (torch._foreach_sub(now, was), was))
    return float(moved / size.clamp(min=1e-12))


def bounds(reply: Reply) -> str | None:
    """What cannot be about the numbers of a reply, or None."""
    if not isinstance(reply.examples, int) or not 0 <= reply.examples <= MOST_EXAMPLES:
        return f"it says that it has {reply.examples} examples"
    if reply.code not in ("", *payload.CODES):
        return f"its tensors travelled as '{reply.code}'"
    odd = [
        name for name, value in reply.metrics.items() if name in OURS or len(name) > LONGEST or not isinstance(value, int | float)
    ]
    if odd or len(reply.metrics) > MOST_METRICS:
        return f"its metrics cannot be taken in ({', '.join(map(str, odd[:3])) or f'{len(reply.metrics)} of them'})"
    return None


def unpacked(reply: Reply, sent: Sent) -> tuple[Reply, str | None]:
    """A reply with its tensors at full shape; or why that cannot be."""
    if not reply.packed:
        return reply, None
    masks = {name: mask for name, mask in sent.plan.masks.items() if name in reply.packed}
    try:
        return replace(reply, state=payload.spread(reply.state, masks), packed=frozenset()), None
    except ValueError as error:
        return reply, str(error)


def upload(plan: Plan, reply: Reply) -> int:
    """Bytes of a reply: the values that exist, their positions only where the client changed them, extras, and what it cut."""
    positions = bool(reply.masks)
    tensors = payload.size(reply.state, plan.masks, positions=positions, code=reply.code)
    return tensors + payload.size(reply.extras) + payload.size(reply.kept)


def last_line(message: Message) -> str:
    """What went wrong, in a line."""
    lines = (message.error.reason or "").strip().splitlines()
    return lines[-1][:LONGEST] if lines else "no reason given"


def traced(message: Message | None) -> Row:
    """The client's own traceback, where it sent one."""
    return {"traceback": (message.error.reason or "")[-MOST_TEXT:]} if message is not None and message.has_error() else {}
