"""The values that plugins see: a device's profile, a sampled client, a client's task and its reply."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hetfl.core.blocks import put, take
from hetfl.core.config import RunOptions
from hetfl.core.data import Examples, Holding
from hetfl.core.plans import Patches, Plan
from hetfl.core.streams import stream
from hetfl.core.widths import Kept, State, load, tensors, within
from hetfl.core.workshop import Workshop

if TYPE_CHECKING:
    from hetfl.core.cost import Cost


def unmeasured(ratio: float) -> Any:
    raise NotImplementedError("this node cannot measure")


def call(model: nn.Module, x: Tensor) -> Any:
    return model(x)


@dataclass(frozen=True)
class Node:
    """Where a client lives, as its profile plugin sees it: client `client` of `clients`, in round `round`.

    `cost(ratio)` is what the submodel of a width ratio costs, `probe(ratio)` the seconds of one training step of it on this
    machine; `examples` and `steps` are those of a round's training, epochs counted.
    """

    client: int
    clients: int
    round: int
    seed: int
    cost: Callable[[float], Cost] = unmeasured
    probe: Callable[[float], float] = unmeasured
    examples: int = 0
    steps: int = 0

    def stream(self, purpose: str, each_round: bool = True) -> torch.Generator:
        return stream(self.seed, purpose, self.round if each_round else 0, self.client)


@dataclass(frozen=True)
class Profile:
    """What a device can afford: `width`, the REMAINING width ratio in (0, 1], and `binding`, what keeps it from more."""

    width: float = 1.0
    binding: str = ""

    @property
    def parameters(self) -> float:
        """The parameter budget that goes with the width: about its square, as a share of the model's parameters."""
        return self.width**2

    @property
    def level(self) -> str:
        """The name under which clients of this capacity are reported."""
        return f"{self.width:g}"


@dataclass(frozen=True)
class Client:
    """A sampled client as the server sees it: `met` is the round of its last valid reply (0: none), `extras` came with it."""

    id: int
    profile: Profile
    extras: State = field(default_factory=dict)
    met: int = 0


@dataclass(frozen=True)
class Shares:
    """Names of the tensors that travel `down` to a client and back `up`; None: all. What does not travel stays with the client."""

    down: Collection[str] | None = None
    up: Collection[str] | None = None


@dataclass(frozen=True, eq=False)
class Down:
    """What a client is sent: tensors of its submodel, what it needs to build that submodel, and extras.

    `model`: its own architecture, in place of a part of the run's (`sizes`). Tensors that are not sent are the client's own, as
    it left them, or those of an untrained model. `up`: the names that travel back, None for all. `local`: normalisation
    statistics stay with the clients, so they are not among the tensors and start anew. `held`: evaluate with the logits of
    classes that the client does not hold put to 0. `remembers`: the round that the client's memory is to be of.
    """

    round: int
    state: State
    sizes: dict[str, int] | None
    model: str | None = None
    masks: State = field(default_factory=dict)
    extras: State = field(default_factory=dict)
    up: Collection[str] | None = None
    held: bool = False
    local: bool = False
    remembers: int = 0


@dataclass(eq=False)
class Task:
    """One client's work in one round. `fit` wrappers may change any field before they yield."""

    client: int
    round: int
    model: nn.Module
    data: Holding
    options: RunOptions
    plan_sizes: dict[str, int]
    full_sizes: dict[str, int]
    extras: State
    memory: State
    workshop: Workshop
    masks: State = field(default_factory=dict)
    public: Examples | None = None
    draws: bool = False
    forward: Callable[[nn.Module, Tensor], Any] = call
    loss: Callable[[Any, Tensor], Tensor] = nn.functional.cross_entropy
    penalties: list[Callable[[nn.Module], Tensor]] = field(default_factory=list)

    def stream(self, purpose: str) -> torch.Generator:
        """The client's own random stream for `purpose` in this round."""
        return stream(self.options.seed, purpose, self.round, self.client)

    def padded(self) -> State:
        """The model's tensors in the shapes of the whole model's, as its leading units; 0 elsewhere."""
        widths = self.workshop.widths
        index = widths.index({name: torch.arange(self.plan_sizes[name]) for name in self.full_sizes})
        mine = tensors(self.model).items()
        return {n: put(t, index.get(n, {}), torch.zeros(widths.shapes[n], dtype=t.dtype)) for n, t in mine}

    def cut(self, kept: Kept) -> None:
        """Goes on with the units `kept` (local numbers) of each group alone: a smaller `model` with the same values."""
        index = within(self.workshop.widths, self.plan_sizes, kept)
        state = {name: take(tensor, index.get(name, {})).clone() for name, tensor in tensors(self.model).items()}
        self.masks = {name: take(mask, index.get(name, {})) for name, mask in self.masks.items()}
        self.plan_sizes = {**self.plan_sizes, **{name: len(units) for name, units in kept.items()}}
        self.model = load(self.workshop.module(self.plan_sizes), state)


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


@dataclass(frozen=True, eq=False)
class Covered:
    """Where one client's update lay: `patches` have no values; `more`: whether it sent more than its tensors."""

    client: int
    patches: Patches
    more: bool


@dataclass(frozen=True, eq=False)
class Returned:
    """A client's valid reply, what it was sent, and the plan that it trained (narrower than sent, if it cut more)."""

    client: Client
    plan: Plan
    sent: State
    reply: Reply


@dataclass(frozen=True)
class Extra:
    """Bounds of a named tensor that a plugin sends beside the weights: most elements, and its dtype."""

    elements: int
    dtype: torch.dtype = torch.float32

    def admits(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.dtype == self.dtype and tensor.numel() <= self.elements
