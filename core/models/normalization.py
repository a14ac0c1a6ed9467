"""Batch normalisation as a policy: where its statistics come from, or what stands in its place (docs/norms.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from hetfl.models.state import State, copy_state

NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)

REPLACEMENTS: dict[str, Callable[[int], nn.Module]] = {  # HeteroFL's ablation (spec heterofl 2.4)
    "none": lambda channels: nn.Identity(),
    "instance": lambda channels: nn.GroupNorm(channels, channels),
    "layer": lambda channels: nn.GroupNorm(1, channels),
    "group": lambda channels: nn.GroupNorm(math.gcd(4, channels), channels),
}


def replace_norms(model: nn.Module, policy: str) -> nn.Module:
    """`model` with what `policy` puts in the place of each batch normalisation; other policies leave it as it is."""
    if policy not in REPLACEMENTS:
        return model
    if isinstance(model, BATCH_NORM):
        return REPLACEMENTS[policy](model.num_features)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BATCH_NORM):
                setattr(parent, name, REPLACEMENTS[policy](child.num_features))
    return model


def plain_norms(model: nn.Module) -> list[str]:
    """Names of the parameters that belong to no normalisation: what pruning and masking are about."""
    ours = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    return [name for name, p in model.named_parameters() if id(p) not in ours]


def track_statistics(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The layers of `model` that keep running statistics, by name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BATCH_NORM)}
    return {name: m for name, m in layers.items() if m.track_running_stats}


def measure_statistics(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[State, int]:
    """Running statistics of one pass: the plain mean over batches of each batch's mean and unbiased variance.

    Returns the model's tensors with these statistics and the number of batches (spec heterofl 2.4; oracle 6.7).
    """
    layers, count = track_statistics(model), 0
    momenta = {name: layer.momentum for name, layer in layers.items()}
    for layer in layers.values():
        layer.reset_running_stats()
        layer.momentum = None
    with torch.no_grad():
        for x, y in batches:
            if len(y) > 1:
                only_norms(model, layers)(x)
                count += 1
    for name, layer in layers.items():
        layer.momentum = momenta[name]
    return copy_state(model), count


def only_norms(model: nn.Module, layers: dict[str, nn.modules.batchnorm._BatchNorm]) -> nn.Module:
    """`model` in evaluation mode but for its batch norms, so that dropout stays out of the statistics."""
    model.eval()
    for layer in layers.values():
        layer.train()
    return model


def running_names(model: nn.Module) -> list[str]:
    """Names of the running means and variances in the model's state."""
    return [f"{name}.{kind}" for name in track_statistics(model) for kind in ("running_mean", "running_var")]


def unset_statistics(model: nn.Module) -> State:
    """The statistics, and counters of batches, of a model that has seen nothing."""
    start = {"running_mean": 0.0, "running_var": 1.0, "num_batches_tracked": 0}
    layers = ((name, kind, getattr(layer, kind)) for name, layer in track_statistics(model).items() for kind in start)
    return {f"{name}.{kind}": torch.full_like(tensor, start[kind]) for name, kind, tensor in layers if tensor is not None}


def without_statistics(state: Mapping[str, Tensor], model: nn.Module) -> State:
    """What of `state` travels where statistics stay with the clients."""
    own = unset_statistics(model)
    return {name: tensor for name, tensor in state.items() if name not in own}


BATCH_NORM = nn.modules.batchnorm._BatchNorm
