"""LotteryFL (Li et al., SEC 2021): every client finds its own winning ticket of the global model (spec lotteryfl)."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from pydantic import PrivateAttr
from torch import Tensor

from hetfl import (
    Client,
    ExtraSpec,
    Field,
    Plan,
    Plugin,
    ReceivedReply,
    Reply,
    Server,
    State,
    Task,
    Update,
    flatten_state,
    hookimpl,
    unflatten_state,
)
from hetfl.models.normalization import list_prunable
from hetfl.models.state import apply_masks, load_state, tensors
from hetfl.plugins.methods.pruning import BUDGET, choose_share, note_remaining, remaining_share, send_budget
from hetfl.submodel.encoding import pack_bits, unpack_bits

INITIAL = "initial/"


class LotteryFL(Plugin):
    """A client whose model is good enough prunes its smallest weights and rewinds the rest to the first model.

    Weights only: neither biases nor norm layers are pruned. Clients start dense, whatever they can afford.
    """

    expected_failures: ClassVar[dict[str, str]] = {"respects_the_budget": "clients start dense and prune themselves"}
    extras_down: ClassVar[dict[str, ExtraSpec]] = {"budget": BUDGET, "first": ExtraSpec(1 << 32)}

    rate: float = Field(0.2, gt=0, lt=1, description="share of each layer's living weights that a pruning removes (r_p)")
    threshold: float = Field(0.2, ge=0, le=1, description="accuracy on held-back training data above which a client prunes")
    target: float | None = Field(
        None, gt=0, le=1, description="share that remains in the end (none: the client's parameter budget)"
    )
    clamp: bool = Field(False, description="end exactly on the target, which the published schedule undershoots")
    _masks: dict[int, State] = PrivateAttr(default_factory=dict)  # a bit for each entry
    _first: State = PrivateAttr(default_factory=dict)

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        """Each client's ticket of the global model; the whole of it until the client has pruned."""
        self._first = self._first or server.state
        return [replace(server.select(torch.arange), masks=self._unpack_ticket(server, client)) for client in clients]

    def _unpack_ticket(self, server: Server, client: Client) -> State:
        """The client's masks (bool, in the global shapes); none before it has pruned."""
        packed = self._masks.get(client.id, {})
        return {name: unpack_bits(bits, tuple(server.state[name].shape)) for name, bits in packed.items()}

    @hookimpl
    def client_extras(self, client: Client, round: int) -> State:
        """The budget; a client that first takes part after round 1 also gets the first model, to which it will rewind."""
        late = not client.last_round and round > 1
        return send_budget(client) | ({"first": to_vector(self._first)} if late else {})

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        if not any(name.startswith(INITIAL) for name in task.client_state):
            now = tensors(task.model)
            first = from_vector(task.extras["first"], now) if "first" in task.extras else now
            task.client_state |= {INITIAL + name: tensor.clone() for name, tensor in first.items()}
        after = choose_share(task, self.rate, self.threshold, self.target, self.clamp)
        if after is not None:
            self._prune(task, after)
        reply = yield
        reply.masks = dict(task.masks)
        return reply

    def _prune(self, task: Task, after: float) -> None:
        """New masks for the task, of which the share `after` nominally remains, and its model rewound to the first one (spec 1)."""
        state, now = tensors(task.model), remaining_share(task)
        weights = {name: state[name] for name in list_prunable(task.model) if state[name].ndim > 1}
        task.masks = {name: prune_smallest(w, task.masks.get(name), 1 - after / now) for name, w in weights.items()}
        note_remaining(task, after)
        first = {name: task.client_state[INITIAL + name] for name in state}
        load_state(task.model, apply_masks(first, task.masks))

    @hookimpl
    def recover(self, replies: Iterable[ReceivedReply]) -> Iterator[Update]:
        for r in replies:
            self._masks[r.client.id] = {name: pack_bits(mask) for name, mask in r.plan.masks.items()}
            yield r.update()

    def state_dict(self) -> State:
        return flatten_state(masks=self._masks, first={0: self._first})

    def load_state_dict(self, state: State) -> None:
        self._masks, self._first = unflatten_state(state, "masks", int), unflatten_state(state, "first", int).get(0, {})


def to_vector(state: State) -> Tensor:
    """All floating-point values of a state in one vector."""
    return torch.cat([tensor.flatten() for tensor in state.values() if tensor.is_floating_point()])


def from_vector(values: Tensor, like: State) -> State:
    """The inverse of `to_vector`; other tensors as in `like`."""
    floats = [name for name, tensor in like.items() if tensor.is_floating_point()]
    parts = values.split([like[name].numel() for name in floats])
    return {**like, **{name: part.reshape(like[name].shape) for name, part in zip(floats, parts, strict=True)}}


def prune_smallest(weight: Tensor, mask: Tensor | None, rate: float) -> Tensor:
    """The mask without the `rate` share of the living (non-zero) weights of smallest magnitude; ties at the threshold stay."""
    alive = weight.ne(0) if mask is None else mask & weight.ne(0)
    if not alive.any():
        return alive
    least = float(np.percentile(weight[alive].abs().double().cpu().numpy(), 100 * rate))
    return alive & (weight.abs().double() >= least)
