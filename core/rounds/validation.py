"""What comes back from clients, checked before any of it is believed: against the plan that was sent, and for what cannot be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.app import Message
from torch import Tensor

from hetfl.hooks.manager import PluginManager
from hetfl.hooks.server import Server
from hetfl.hooks.values import ExtraSpec
from hetfl.models.state import State
from hetfl.profiling.node import Profile
from hetfl.rounds.client import Transport
from hetfl.rounds.messages import Assignment, Row
from hetfl.rounds.records import MalformedError
from hetfl.submodel import encoding
from hetfl.submodel.encoding import CODES
from hetfl.submodel.plan import Plan
from hetfl.training.task import Reply

NOTHING = Reply({}, 0)

MOST_EXAMPLES = 1 << 40

MOST_METRICS = 64

MOST_TEXT, LONGEST = 20_000, 500  # characters of a traceback, and of a line

OURS = {"round", "client", "level", "bottleneck", "bytes down", "bytes up", "examples", "fault", "traceback", "parameters", "MACs",
        "memory", "change"}  # fmt: skip


@dataclass(eq=False)
class CheckedReply:
    """A reply as it was taken in: what was sent, narrowed to what came back, and the `fault` that makes it unusable."""

    sent: Assignment
    reply: Reply = NOTHING
    fault: str | None = None
    row: Row = field(default_factory=dict)


class ReplyValidator:
    """Checks messages of clients; `travels` leaves of a state what crosses the network."""

    def __init__(self, server: Server, roles: PluginManager, desk: Transport, travels: Callable[[State], State]) -> None:
        self._server, self._roles, self._desk, self._travels = server, roles, desk, travels

    def take(self, sent: Assignment, message: Message) -> CheckedReply:
        """A reply to a training message."""
        if message.has_error():
            return CheckedReply(sent, NOTHING, last_line(message), traceback_row(message))
        reply, fault = self._read(message)
        if fault is None:
            sent, fault = self._narrowed(sent, reply)
        if fault is None:
            reply, fault = fill_reply(reply, sent)
        if fault is None:
            expected = self._travels({name: t for name, t in sent.state.items() if name in sent.up})
            fault = number_fault(reply) or reply_fault(reply, expected, self._roles.extras_up)
        if fault is not None:
            return CheckedReply(sent, NOTHING, fault)
        row = {"examples": reply.examples, **reply.metrics, "bytes up": upload_bytes(sent.plan, reply)}
        row["change"] = relative_change(reply.state, expected)
        return CheckedReply(sent, reply, None, row)

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

    def _narrowed(self, sent: Assignment, reply: Reply) -> tuple[Assignment, str | None]:
        """What was sent, as if it had been as narrow as what the client went on to train; or why that cannot be."""
        if not (reply.kept or reply.masks):
            return sent, None
        source = self._roles.base_state(self._server, sent.client)
        if reply.kept:
            if fault := kept_fault(reply.kept, sent.plan.sizes):
                return sent, fault
            plan = sent.plan.narrow(reply.kept, {})
            sent = replace(sent, plan=plan, state=plan.take(source))
        if reply.masks:
            if fault := mask_fault(reply.masks, sent.plan.masks, sent.state):
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
        return found if len(found.bottleneck) <= LONGEST else replace(found, bottleneck=found.bottleneck[:LONGEST])

    def scores(self, message: Message) -> dict[str, float]:
        """What a client measured; empty where it did not or cannot be believed."""
        found = self._opened(message) if message.has_content() else {}
        usable = isinstance(found, dict) and "accuracy" in found and all(math.isfinite(v) for v in found.values())
        return dict(found) if usable else {}

    def statistics(self, expected: State, message: Message) -> Reply | None:
        """Normalisation statistics, in the shapes of `expected`; None where there are none to be used."""
        found = self._opened(message) if message.has_content() else None
        usable = isinstance(found, Reply) and not (number_fault(found) or reply_fault(found, expected, {}))
        return found if isinstance(found, Reply) and usable else None


def relative_change(state: State, before: State) -> float:
    """How far a client went: the norm of what it changed over the norm of what it began with."""
    pairs = [(t, before[n]) for n, t in state.items() if t.is_floating_point()]
    if not pairs:
        return 0.0
    now, was = (list(column) for column in zip(*pairs, strict=True))
    moved, size = (torch.stack(torch._foreach_norm(tensors)).norm() for tensors in (torch._foreach_sub(now, was), was))
    return float(moved / size.clamp(min=1e-12))


def number_fault(reply: Reply) -> str | None:
    """What cannot be about the numbers of a reply, or None."""
    if not isinstance(reply.examples, int) or not 0 <= reply.examples <= MOST_EXAMPLES:
        return f"it says that it has {reply.examples} examples"
    if reply.code not in ("", *CODES):
        return f"its tensors travelled as '{reply.code}'"
    odd = [
        name for name, value in reply.metrics.items() if name in OURS or len(name) > LONGEST or not isinstance(value, int | float)
    ]
    if odd or len(reply.metrics) > MOST_METRICS:
        return f"its metrics cannot be taken in ({', '.join(map(str, odd[:3])) or f'{len(reply.metrics)} of them'})"
    return None


def fill_reply(reply: Reply, sent: Assignment) -> tuple[Reply, str | None]:
    """A reply with its tensors at full shape; or why that cannot be."""
    if not reply.packed:
        return reply, None
    masks = {name: mask for name, mask in sent.plan.masks.items() if name in reply.packed}
    try:
        return replace(reply, state=encoding.fill_masked(reply.state, masks), packed=frozenset()), None
    except ValueError as error:
        return reply, str(error)


def upload_bytes(plan: Plan, reply: Reply) -> int:
    """Bytes of a reply: the values that exist, their positions only where the client changed them, extras, and what it cut."""
    positions = bool(reply.masks)
    tensors = encoding.payload_bytes(reply.state, plan.masks, positions=positions, code=reply.code)
    return tensors + encoding.payload_bytes(reply.extras) + encoding.payload_bytes(reply.kept)


def last_line(message: Message) -> str:
    """What went wrong, in a line."""
    lines = (message.error.reason or "").strip().splitlines()
    return lines[-1][:LONGEST] if lines else "no reason given"


def traceback_row(message: Message | None) -> Row:
    """The client's own traceback, where it sent one."""
    return {"traceback": (message.error.reason or "")[-MOST_TEXT:]} if message is not None and message.has_error() else {}


def kept_fault(kept: Mapping[str, Tensor], sizes: Mapping[str, int]) -> str | None:
    """Why what a reply says it kept of the groups cannot be: units that were not sent; or None."""
    for group, units in kept.items():
        if group not in sizes or not isinstance(units, Tensor) or units.dtype != torch.int64 or units.ndim != 1:
            return f"what it kept of '{group}' is no list of units of a group"
        if not 0 < len(units) == len(units.unique()) or int(units.min()) < 0 or int(units.max()) >= sizes[group]:
            return f"it kept units of group '{group}' that it was not sent"
    return None


def mask_fault(masks: Mapping[str, Tensor], before: Mapping[str, Tensor], state: State) -> str | None:
    """Why the masks of a reply cannot be: of other tensors or shapes than `state`'s, or wider than those `before`; or None."""
    for name, mask in masks.items():
        if name not in state or not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != state[name].shape:
            return f"its mask of '{name}' is no mask of a tensor that it was sent"
        if name in before and bool((mask & ~before[name]).any()):
            return f"its mask of '{name}' is wider than the one that was sent"
    return None


def reply_fault(reply: Reply, sent: State, allowed: Mapping[str, ExtraSpec]) -> str | None:
    """Why a reply cannot be used, or None: it must hold the tensors of `sent`, finite, and only declared extras."""
    if set(reply.state) != set(sent):
        odd = sorted(set(reply.state) ^ set(sent))
        return f"its tensors are not those that were sent ({', '.join(odd[:3])})"
    for name, tensor in reply.state.items():
        expected = sent[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            got, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, expected))
            return f"tensor {name} is {got}, not {wanted}"
        if tensor.is_floating_point() and not finite(tensor):
            return f"tensor {name} holds NaN or infinity"
    return extras_fault(reply.extras, allowed)


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; a finite sum says so at once."""
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def extras_fault(extras: State, allowed: Mapping[str, ExtraSpec]) -> str | None:
    """What is wrong with the extras of a plan or a reply, or None."""
    for name, extra in extras.items():
        if name not in allowed or not allowed[name].admits(extra):
            return f"extra '{name}' is undeclared or larger than declared"
    return None
