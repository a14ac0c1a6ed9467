"""Replies of training, checked before any of them is believed: against the plan that was sent, and for what cannot be."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hetfl.aggregation.updates import Merged
from hetfl.hooks.answers import find_extras_fault
from hetfl.hooks.manager import PluginManager
from hetfl.hooks.server import Server
from hetfl.hooks.values import ExtraSpec
from hetfl.models.state import State, apply_masks
from hetfl.rounds.messages import LONGEST_LINE, NO_ANSWER, Assignment, Failure
from hetfl.rounds.rows import OWN_ACCURACY, RESERVED, SECONDS
from hetfl.submodel import encoding
from hetfl.submodel.blocks import take_blocks
from hetfl.submodel.plan import Plan
from hetfl.submodel.widths import within
from hetfl.training.task import Reply

MOST_METRICS = 64
MOST_EXAMPLES = 10**9
MOST_SECONDS = 1e8
MOST_NUMBER = 1 << 63
LARGEST_CODE, SLACK = 2, 4096  # an encoded update may be so many times as large as what was sent, and so many bytes larger


@dataclass(frozen=True)
class Change:
    """How far a client went, the norm of what it changed over the norm of what it began with: of its weights, and of its `whole`
    model with the running statistics."""

    weights: float = 0.0
    whole: float = 0.0


@dataclass(eq=False)
class CheckedReply:
    """A reply, what was sent narrowed to what came back, and the `fault` that makes it unusable.

    `expected` are the tensors that its own ones are compared with, `change` how far these are from them.
    """

    assignment: Assignment
    reply: Reply
    fault: str | None = None
    bytes_up: int = 0
    change: Change = field(default_factory=Change)
    expected: State = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ReplyValidator:
    """Decodes and checks the replies of training in `round`; `at_home` are the tensors that never cross the network."""

    server: Server
    plugins: PluginManager
    at_home: Collection[str]
    round: int

    def check(self, assignment: Assignment, answer: Any) -> CheckedReply:
        """The reply with its tensors at full shape, or the fault."""
        reply, fault = (answer, None) if isinstance(answer, Reply) else (Reply({}, 0), NO_ANSWER)
        if isinstance(answer, Failure):
            fault = answer.reason
        if fault is None:
            assignment, fault = self._narrow(assignment, reply)
        arrived = reply
        if fault is None:
            reply, fault = fill_reply(reply, assignment)
        if fault is None and reply.encoded:
            reply, fault = self._decode(reply, assignment)
        if fault is None:
            back = assignment.up.difference(self.at_home)
            expected = {name: t for name, t in assignment.state.items() if name in back}
            fault = number_fault(reply, self.server.kind.least) or reply_fault(reply, expected, self.plugins.extras_up)
        if fault is not None:
            return CheckedReply(assignment, Reply({}, 0), fault)
        reply = undo_rounding(reply, assignment)
        change = measure_change(reply.state, expected)
        return CheckedReply(assignment, reply, None, upload_bytes(assignment.plan, arrived), change, expected)

    def _decode(self, reply: Reply, assignment: Assignment) -> tuple[Reply, str | None]:
        """A reply with the tensors whose updates were encoded; or why that cannot be."""
        names = [name for name in encoding.list_updated(assignment.travels) if name in assignment.up]
        masks = {name: assignment.plan.masks[name] for name in names if name in assignment.plan.masks}
        before = {name: assignment.arrived.get(name, assignment.state[name]) for name in names}
        sent = encoding.select_existing(before, masks)
        if fault := encoded_fault(reply.encoded, sent):
            return reply, fault
        update = self.plugins.decode(self.server, assignment.client, reply.encoded, sent, self.round)
        if fault := tensors_fault(update, sent):
            return reply, f"decoded, {fault}"
        moved = encoding.fill_masked({name: t + update[name] for name, t in sent.items()}, masks)
        return replace(reply, state={**reply.state, **moved}, encoded={}), None

    def _narrow(self, assignment: Assignment, reply: Reply) -> tuple[Assignment, str | None]:
        """What was sent, as if it had been as narrow as what the client went on to train; or why that cannot be."""
        if not (reply.kept or reply.masks):
            return assignment, None
        source = assignment.source
        if reply.kept:
            if fault := kept_fault(reply.kept, assignment.plan.sizes):
                return assignment, fault
            plan, index = assignment.plan.narrow(reply.kept, {}), within(self.server.widths, assignment.plan.sizes, reply.kept)
            arrived = take_blocks(assignment.arrived, index) if assignment.arrived else {}
            assignment = replace(assignment, plan=plan, state=plan.take(source), arrived=arrived)
        if reply.masks:
            if fault := mask_fault(reply.masks, assignment.plan.masks, assignment.state):
                return assignment, fault
            plan = assignment.plan.narrow({}, reply.masks)
            arrived = apply_masks(assignment.arrived, reply.masks)
            assignment = replace(assignment, plan=plan, state=plan.take(source), arrived=arrived)
        return assignment, None


def number_fault(reply: Reply, least: float = 0.0) -> str | None:
    """What cannot be about the numbers of a reply, whose score is at least `least`, or None."""
    if not isinstance(reply.examples, int) or not 0 <= reply.examples <= MOST_EXAMPLES:
        return f"it says that it has {reply.examples} examples"
    odd = [n for n, v in reply.metrics.items() if not is_metric(n, v, least)]
    if odd or len(reply.metrics) > MOST_METRICS:
        return f"its metrics cannot be taken in ({', '.join(map(str, odd[:3])) or f'{len(reply.metrics)} of them'})"
    return None


def is_metric(name: Any, value: Any, least: float = 0.0) -> bool:
    """Whether a client may say this of itself: a number under a name of its own, scores in [least, 1], seconds that can be."""
    if not isinstance(name, str) or name in RESERVED or len(name) > LONGEST_LINE or not isinstance(value, int | float):
        return False
    if isinstance(value, int) and abs(value) > MOST_NUMBER:
        return False
    if name == OWN_ACCURACY:
        return least <= value <= 1
    return name != SECONDS or 0 <= value < MOST_SECONDS


def fill_reply(reply: Reply, assignment: Assignment) -> tuple[Reply, str | None]:
    """A reply with its tensors at full shape; or why that cannot be."""
    if not reply.packed:
        return reply, None
    masks = {name: mask for name, mask in assignment.plan.masks.items() if name in reply.packed}
    try:
        return replace(reply, state=encoding.fill_masked(reply.state, masks), packed=frozenset()), None
    except ValueError as error:
        return reply, str(error)


def undo_rounding(reply: Reply, assignment: Assignment) -> Reply:
    """A reply as if its client had begun with what the server has, and not with what a codec has made of it on the way."""
    back = {name: assignment.state[name] - t for name, t in assignment.arrived.items() if name in reply.state}
    return replace(reply, state={n: t + back[n] if n in back else t for n, t in reply.state.items()}) if back else reply


def measure_change(state: State, before: State) -> Change:
    """How far a client went that began with `before` and ended with `state`; 0 where that began as all zeros."""
    names = [name for name, t in state.items() if t.is_floating_point()]
    if not names:
        return Change()
    now, was = [state[name] for name in names], [before[name].to(state[name].device) for name in names]
    moved, size = (torch.stack(torch._foreach_norm(tensors)) for tensors in (torch._foreach_sub(now, was), was))
    weights = torch.tensor([not name.endswith(encoding.STATISTICS) for name in names])

    def share(rows: Tensor) -> float:
        norm = size[rows].norm()
        return float(moved[rows].norm() / norm) if norm > 0 else 0.0

    return Change(share(weights), share(torch.ones_like(weights)))


def upload_bytes(plan: Plan, reply: Reply) -> int:
    """Bytes of a reply as it came: the values that exist, their positions where the client says them, what codecs made of updates,
    extras, and what it cut."""
    positions = sum(encoding.mask_bytes(name, mask) for name, mask in reply.masks.items())
    return positions + encoding.payload_bytes(reply.state, plan.masks, reply.encoded, reply.extras, reply.kept, positions=False)


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


def encoded_fault(encoded: State, sent: State) -> str | None:
    """Why what codecs are said to have made of the update of `sent` is not even decoded, or None."""
    travels = {n for n, t in encoded.items() if isinstance(n, str) and isinstance(t, Tensor) and t.dtype in encoding.TRAVELS}
    if odd := [n for n in encoded if n not in travels]:
        return f"its encoded update holds what does not travel ({', '.join(map(str, odd[:3]))})"
    most = LARGEST_CODE * encoding.payload_bytes(sent) + SLACK
    if (size := encoding.payload_bytes(encoded)) > most:
        return f"its encoded update has {size:,} bytes, of which {most:,} are taken"
    odd = [n for n, t in encoded.items() if t.is_floating_point() and not all_finite(t)]
    return f"its encoded update holds NaN or infinity ({', '.join(odd[:3])})" if odd else None


def reply_fault(reply: Reply, sent: State, allowed: Mapping[str, ExtraSpec]) -> str | None:
    """Why a reply cannot be used, or None: it must hold the tensors of `sent`, finite, and only declared extras."""
    return tensors_fault(reply.state, sent) or find_extras_fault(reply.extras, allowed)


def tensors_fault(state: State, sent: State) -> str | None:
    """Why tensors are not such as `sent`, finite ones, or None."""
    if set(state) != set(sent):
        odd = sorted(set(state) ^ set(sent))
        return f"its tensors are not those that were sent ({', '.join(odd[:3])})"
    for name, tensor in state.items():
        expected = sent[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            got, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, expected))
            return f"tensor {name} is {got}, not {wanted}"
        if tensor.is_floating_point() and not all_finite(tensor):
            return f"tensor {name} holds NaN or infinity"
    return None


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; a finite sum says so at once."""
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def is_finite(merged: Merged) -> bool:
    """Whether the next global model, and every branch, is all numbers."""
    branches = (patch.values for patches in merged.branches.values() for patch in patches.values())
    return all(all_finite(t) for t in (*merged.state.values(), *branches) if t.is_floating_point())
