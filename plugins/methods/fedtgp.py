"""FedTGP (Zhang et al., AAAI 2024): global prototypes that the server learns, further apart than the clients' are."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from pydantic import PrivateAttr
from torch import Tensor
from torch.nn import functional as F

from hetfl import Field, Server, State
from hetfl.plugins.methods.prototypes import Prototypes
from hetfl.training.tuning import cycle_batches


class FedTGP(Prototypes):
    """The global prototypes are what a small network makes of an embedding of each class, both trained from round to round.

    They are to be nearest to the clients' prototypes of their class, by a margin: how far apart the clients' classes are now, but
    at most `margin`.
    """

    weight: float = Field(10.0, ge=0, description="weight of the distance from the global prototypes (lambda)")
    epochs: int = Field(100, ge=1, description="passes of the server over the clients' prototypes each round (S)")
    lr: float = Field(0.01, gt=0, description="SGD learning rate of these")
    batch: int = Field(10, ge=1, description="prototypes in a step")
    margin: float = Field(100.0, ge=0, description="the margin is at most this (tau)")
    _net: State = PrivateAttr(default_factory=dict)

    def merge(self, server: Server, prototypes: Tensor, counts: Tensor, round: int) -> tuple[Tensor, Tensor]:
        net = self._net or draw_net(server.classes, prototypes.shape[2], server.stream("prototypes"))
        clients, y = (counts > 0).nonzero(as_tuple=True)
        x, margin = prototypes[clients, y], min(find_margin(prototypes, counts > 0), self.margin)
        net = {name: t.clone().requires_grad_() for name, t in net.items()}
        optimizer = torch.optim.SGD(net.values(), self.lr)
        rows = cycle_batches(len(x), self.batch, server.stream("prototype batches", round))
        for _ in range(self.epochs * math.ceil(len(x) / self.batch)):
            at = next(rows)
            optimizer.zero_grad()
            contrast(generate(net), x[at], y[at], margin).backward()
            optimizer.step()
        trained = {name: t.detach() for name, t in net.items()}
        if not all(bool(t.isfinite().all()) for t in trained.values()):
            server.alarms.append(f"fedtgp: training the prototypes at a rate of {self.lr:g} diverged, so they stay as they were")
            return self._known, self._prototypes
        self._net = trained
        return torch.ones(server.classes, dtype=torch.bool), generate(trained)

    def state_dict(self) -> State:
        return {**super().state_dict(), **{f"net/{name}": t for name, t in self._net.items()}}

    def load_state_dict(self, state: State) -> None:
        super().load_state_dict(state)
        self._net = {name.removeprefix("net/"): t for name, t in state.items() if name.startswith("net/")}


def draw_net(classes: int, dim: int, generator: torch.Generator) -> State:
    """The embeddings (classes, dim), normally distributed, and two linear layers of `dim` to `dim` as torch draws them."""
    shapes = {"hidden": (dim, dim), "hidden bias": (dim,), "out": (dim, dim), "out bias": (dim,)}
    layers = {name: (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(dim) for name, shape in shapes.items()}
    return {"embedding": torch.randn(classes, dim, generator=generator), **layers}


def generate(net: Mapping[str, Tensor]) -> Tensor:
    """The global prototypes (classes, dim)."""
    hidden = F.relu(F.linear(net["embedding"], net["hidden"], net["hidden bias"]))
    return F.linear(hidden, net["out"], net["out bias"])


def find_margin(prototypes: Tensor, held: Tensor) -> float:
    """The largest over classes of how far a class's mean prototype is from the nearest other class's.

    `prototypes` (clients, classes, dim) count where they are `held`, bool (clients, classes); infinite where there is one class.
    """
    some = held.any(0)
    means = ((prototypes * held[:, :, None]).sum(0) / held.sum(0).clamp(min=1)[:, None])[some]
    apart = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")
    return float(apart.fill_diagonal_(math.inf).amin(1).amax())


def contrast(prototypes: Tensor, x: Tensor, y: Tensor, margin: float) -> Tensor:
    """Cross entropy of the classes y (N,) of the clients' prototypes x (N, dim) under minus their distances from the global ones,
    `margin` added to the distance from the own."""
    apart = torch.cdist(x, prototypes, compute_mode="donot_use_mm_for_euclid_dist")
    return F.cross_entropy(-(apart + margin * F.one_hot(y, len(prototypes))), y)
