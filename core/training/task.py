"""One client's work in one round, and its reply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hetfl.config import RunOptions
from hetfl.data.dataset import ClientData, Examples
from hetfl.models.state import State, load_state, tensors
from hetfl.rng import stream
from hetfl.submodel.blocks import put, take
from hetfl.submodel.builder import SubmodelBuilder
from hetfl.submodel.widths import Kept, within


def call_model(model: nn.Module, x: Tensor) -> Any:
    return model(x)


@dataclass(eq=False)
class Task:
    """One client's work in one round. `fit` wrappers may change any field before they yield."""

    client: int
    round: int
    model: nn.Module
    data: ClientData
    options: RunOptions
    plan_sizes: dict[str, int]
    full_sizes: dict[str, int]
    extras: State
    client_state: State
    builder: SubmodelBuilder
    masks: State = field(default_factory=dict)
    public: Examples | None = None
    draws: bool = False
    forward: Callable[[nn.Module, Tensor], Any] = call_model
    loss: Callable[[Any, Tensor], Tensor] = nn.functional.cross_entropy
    penalties: list[Callable[[nn.Module], Tensor]] = field(default_factory=list)

    def stream(self, purpose: str) -> torch.Generator:
        """The client's own random stream for `purpose` in this round."""
        return stream(self.options.seed, purpose, self.round, self.client)

    def padded(self) -> State:
        """The model's tensors in the shapes of the whole model's, as its leading units; 0 elsewhere."""
        widths = self.builder.widths
        index = widths.index({name: torch.arange(self.plan_sizes[name]) for name in self.full_sizes})
        mine = tensors(self.model).items()
        return {n: put(t, index.get(n, {}), torch.zeros(widths.shapes[n], dtype=t.dtype)) for n, t in mine}

    def cut(self, kept: Kept) -> None:
        """Goes on with the units `kept` (local numbers) of each group alone: a smaller `model` with the same values."""
        index = within(self.builder.widths, self.plan_sizes, kept)
        state = {name: take(tensor, index.get(name, {})).clone() for name, tensor in tensors(self.model).items()}
        self.masks = {name: take(mask, index.get(name, {})) for name, mask in self.masks.items()}
        self.plan_sizes = {**self.plan_sizes, **{name: len(units) for name, units in kept.items()}}
        self.model = load_state(self.builder.module(self.plan_sizes), state)


@dataclass(eq=False)
class Reply:
    """What a client sends back: its trained tensors, extras and metrics.

    Where it trained less than it was sent, `kept` has the units of each group that it cut (local numbers, LongTensor) and
    `masks` (bool, in the shapes of `state`) the entries that still exist. `packed`: the tensors of `state` of which only the values
    that exist have travelled, in their order. `code`: how floating-point tensors travel ("": as they are, fp16, int8).
    """

    state: State
    examples: int
    metrics: dict[str, float] = field(default_factory=dict)
    extras: State = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    masks: State = field(default_factory=dict)
    packed: frozenset[str] = frozenset()
    code: str = ""
