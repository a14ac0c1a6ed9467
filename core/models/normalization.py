"""Batch normalisation as a policy: where its statistics come from, or which layer replaces it (docs/norms.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hetfl.models.state import State, copy_state, move_state

BATCH_NORM = nn.modules.batchnorm._BatchNorm

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

STATIC = ("static", "static-slices")  # what training tracks is not used: every network gets its statistics from a pass

REPLACEMENTS: dict[str, Callable[[int], nn.Module]] = {  # HeteroFL's ablation (spec heterofl 2.4)
    "none": lambda channels: nn.Identity(),
    "instance": lambda channels: nn.GroupNorm(channels, channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "group": lambda channels: nn.GroupNorm(math.gcd(4, channels), channels),
}


def replace_norms(model: nn.Module, policy: str) -> nn.Module:
    """`model` with each batch normalisation replaced, in place, where `policy` is one of REPLACEMENTS; else as it is."""
    if policy not in REPLACEMENTS:
        return model
    if isinstance(model, BATCH_NORM):
        return REPLACEMENTS[policy](model.num_features)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BATCH_NORM):
                setattr(parent, name, REPLACEMENTS[policy](child.num_features))
    return model


def list_prunable(model: nn.Module) -> list[str]:
    """Names of the parameters of all layers but normalisations: those that pruning and masking apply to."""
    norms = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    return [name for name, p in model.named_parameters() if id(p) not in norms]


def find_tracking_norms(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The batch norms of `model` that keep running statistics, by name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BATCH_NORM)}
    return {name: m for name, m in layers.items() if m.track_running_stats}


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and variance (channels,) of `count` values of each channel, float64."""

    count: int
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, layer: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Moments:
        """Those of x (N, channels, …), the last input of a batch norm in training mode whose momentum is 1."""
        count = x.numel() // x.shape[1]
        mean, unbiased = layer.running_mean.double(), layer.running_var.double()  # type: ignore[union-attr]
        return cls(count, mean, unbiased * ((count - 1) / count))

    def __add__(self, other: Moments) -> Moments:
        """Those of both together: the law of total variance."""
        count = self.count + other.count
        share, apart = other.count / count, other.mean - self.mean
        within = (1 - share) * self.variance + share * other.variance
        return Moments(count, self.mean + share * apart, within + share * (1 - share) * apart.square())


def measure_statistics(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[State, int]:
    """Sets the running statistics of `model` to the mean and variance of all that its batch norms are given in one pass over
    `batches` of (x, y), each normalised by its own statistics as in training (spec heterofl 2.4).

    The authors take the plain mean of the batches' means and of their unbiased variances, which leaves out how far batches are
    apart. Dropout is off; a batch of one example is left out, for it has no variance. Returns the statistics, and the number of
    examples that they are of.
    """
    layers, found, examples = find_tracking_norms(model), dict[str, Moments](), 0

    def forget(layer: Any, _: object) -> None:  # 0 times what is not finite is not 0
        layer.running_mean.zero_()
        layer.running_var.zero_()

    def note(name: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], None]:
        def add(layer: nn.modules.batchnorm._BatchNorm, inputs: tuple[Tensor, ...], _: Tensor) -> None:
            now = Moments.of(layer, inputs[0])
            found[name] = found[name] + now if name in found else now

        return add

    with ExitStack() as after, torch.no_grad():
        model.eval()
        for name, layer in layers.items():
            after.callback(layer.register_forward_pre_hook(forget).remove)
            after.callback(layer.register_forward_hook(note(name)).remove)
            after.callback(setattr, layer, "momentum", layer.momentum)
            layer.train().momentum = 1.0
        for x, y in batches:
            if len(y) > 1:
                model(x)
                examples += len(y)
        for name, m in found.items():
            layers[name].running_mean.copy_(m.mean)  # type: ignore[union-attr]
            layers[name].running_var.copy_(m.variance)  # type: ignore[union-attr]
    names = running_names(model)
    return move_state({name: tensor for name, tensor in copy_state(model).items() if name in names}, "cpu"), examples


def running_names(model: nn.Module) -> list[str]:
    """Names of the running means and variances in the state of `model`."""
    return [f"{name}.{kind}" for name in find_tracking_norms(model) for kind in ("running_mean", "running_var")]


def initial_statistics(model: nn.Module) -> State:
    """The statistics, and counters of batches, that `model` has before any training: means 0, variances 1, counters 0."""
    start = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
    layers = ((name, kind, getattr(layer, kind)) for name, layer in find_tracking_norms(model).items() for kind in start)
    return {f"{name}.{kind}": torch.full_like(tensor, start[kind]) for name, kind, tensor in layers if tensor is not None}


def drop_statistics(state: Mapping[str, Tensor], model: nn.Module) -> State:
    """`state` without running statistics and counters of batches: what travels where these stay with the clients."""
    statistics = initial_statistics(model)
    return {name: tensor for name, tensor in state.items() if name not in statistics}
