"""One client's work in one round, and its reply."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hetfl.config import RunOptions
from hetfl.data.dataset import ClientData, Examples
from hetfl.data.kinds import CLASSIFY, TaskKind
from hetfl.models.state import State, call_at, list_places, load_state, named_tensors, tensors
from hetfl.rng import stream
from hetfl.submodel.blocks import cells, is_leading, put, take
from hetfl.submodel.builder import SubmodelBuilder
from hetfl.submodel.widths import Kept, within


def call_model(model: nn.Module, x: Tensor) -> Any:
    """The default of Task.forward: the answers (N, …) to x (N, *shape)."""
    return model(x)


@dataclass(eq=False)
class Task:
    """One client's work in one round, all of it on the run's device. Wrappers of the hook `fit` may change any field before they
    yield.

    client, round       the client's id, counted from 0; the round, counted from 1
    model               the client's submodel holding the tensors that it was sent; trained in place
    data                the client's own examples: `train`, `test` and the classes it holds
    options             all options of the run: epochs, batch size, optimiser, seed ...
    plan_sizes          number of units that `model` has of each width group; with `full_sizes`, those of the whole model
    extras              tensors that plugins sent along (hook `client_extras`)
    client_state        tensors that this client keeps between rounds; what is written to it is there in its next round
    builder             builds submodels of other sizes on this worker
    masks               bool, in the shapes of parameters, by name: entries that are False do not exist and are not trained
    public              the public examples that the server sent along, or None
    draws               whether the forward pass draws random numbers (dropout), which then come from `stream`
    forward, loss       `loss(forward(model, x), y)` is the loss on a batch x (N, *shape), y (N, …): that of `kind` to begin with
    penalties           functions of the model that are added to the loss
    constants           the client's own tensors that `forward` and `penalties` read here when they are called: those of one task
                        may stand for a group of clients, each with tensors of its own (`Plugin.stackable`)
    parts               the modules that parts of `model` run in (`make_part`), each with its number of units of each group
    train               what trains the task where no plugin does; None: the core's own training
    """

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
    loss: Callable[[Any, Tensor], Tensor] = CLASSIFY.loss
    penalties: list[Callable[[nn.Module], Tensor]] = field(default_factory=list)
    constants: State = field(default_factory=dict)
    parts: dict[nn.Module, dict[str, int]] = field(default_factory=dict)
    train: Callable[[Task], Reply] | None = None

    @property
    def kind(self) -> TaskKind:
        """What the targets are, and how answers are compared with them or with others."""
        return self.data.train.kind

    def stream(self, purpose: str) -> torch.Generator:
        """The client's own random stream for `purpose` in this round, at its start."""
        return stream(self.options.seed, purpose, self.round, self.client)

    def pad_state(self) -> State:
        """The model's tensors in the whole model's shapes, as its leading units; 0 elsewhere."""
        widths = self.builder.widths
        index = widths.index({name: torch.arange(self.plan_sizes[name]) for name in self.full_sizes})
        own = tensors(self.model).items()
        return {n: put(t, index.get(n, {}), torch.zeros(widths.shapes[n], dtype=t.dtype)) for n, t in own}

    def make_part(self, kept: Kept) -> Callable[[Tensor], Any]:
        """What answers x (N, *shape) with the units `kept` of each group alone, in training mode; gradients and running statistics
        reach the model's own tensors.

        `kept` holds positions (units,) within the present model, as of `cut`; the model itself stays as it is.
        """
        sizes = {**self.plan_sizes, **{name: len(units) for name, units in kept.items()}}
        if sizes == self.plan_sizes:
            return self.model
        index, small = within(self.builder.widths, self.plan_sizes, kept), self.builder.module(sizes)
        self.parts[small] = sizes
        places, own, names = list_places(small), named_tensors(self.model), list(tensors(self.model))
        buffers = [n for n, _ in self.model.named_buffers() if n in names]
        apart = [n for n in buffers if not all(map(is_leading, index.get(n, {}).values()))]  # read as copies

        def answer(x: Tensor) -> Any:
            part = {name: take(own[name], index.get(name, {})) for name in names}
            answers = call_at(places, small.train(), part, (x,))
            for name in apart:  # as batch norm writes: unseen by autograd, which keeps other parts' statistics until it goes back
                own[name].data[cells(index[name], own[name])] = part[name]
            return answers

        return answer

    def cut(self, kept: Kept) -> None:
        """Replaces `model` by a smaller one of the units `kept` of each group, with the same values; `masks` are cut too.

        `kept` holds positions (units,) within the present model: of sizes {"fc1": 8} and kept {"fc1": [0, 3]}, the model that
        remains has the units 0 and 3 of fc1 as its units 0 and 1.
        """
        index = within(self.builder.widths, self.plan_sizes, kept)
        state = {name: take(tensor, index.get(name, {})).clone() for name, tensor in tensors(self.model).items()}
        self.masks = {name: take(mask, index.get(name, {})) for name, mask in self.masks.items()}
        self.plan_sizes = {**self.plan_sizes, **{name: len(units) for name, units in kept.items()}}
        self.model = load_state(self.builder.module(self.plan_sizes), state)


@dataclass(eq=False)
class Reply:
    """What a client sends back.

    state       its trained tensors by name
    examples    number of training examples, the weight of FedAvg
    metrics     numbers by name for clients.csv: loss, seconds ...
    extras      further tensors for the plugins' server side
    kept        where the client cut its model: positions (units,) within the model that it was sent, of each group that it cut
    masks       bool, in the shapes of `state`: the entries that still exist
    packed      names of those tensors of `state` of which only the values that exist have travelled, in their order
    encoded     what codecs (hook `encode`) made of the updates of those tensors that are not in `state` any more
    """

    state: State
    examples: int
    metrics: dict[str, float] = field(default_factory=dict)
    extras: State = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)
    masks: State = field(default_factory=dict)
    packed: frozenset[str] = frozenset()
    encoded: State = field(default_factory=dict)
