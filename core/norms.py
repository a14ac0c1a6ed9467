"""Statistics of batch normalisation as a policy: averaged from the updates, from the clients' passes, or from server data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from hetfl.core.train import BATCH_NORM
from hetfl.core.widths import State, tensors


def tracked(model: nn.Module) -> dict[str, nn.modules.batchnorm._BatchNorm]:
    """The layers of `model` that keep running statistics, by name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BATCH_NORM)}
    return {name: m for name, m in layers.items() if m.track_running_stats}


def statistics(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[State, int]:
    """Running statistics of one pass: the plain mean over batches of each batch's mean and unbiased variance.

    Returns the model's tensors with these statistics and the number of batches (spec heterofl 2.4; oracle 6.7).
    """
    layers, count = tracked(model), 0
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
    return {name: tensor.clone() for name, tensor in tensors(model).items()}, count


def only_norms(model: nn.Module, layers: dict[str, nn.modules.batchnorm._BatchNorm]) -> nn.Module:
    """`model` in evaluation mode but for its batch norms, so that dropout stays out of the statistics."""
    model.eval()
    for layer in layers.values():
        layer.train()
    return model


def running(model: nn.Module) -> list[str]:
    """Names of the running means and variances in the model's state."""
    return [f"{name}.{kind}" for name in tracked(model) for kind in ("running_mean", "running_var")]
