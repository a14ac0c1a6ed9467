"""HeteroFL's scaler (Diao et al., ICLR 2021; spec heterofl 2.3): in training, a submodel's activations over its width ratio."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from hetfl import Plugin, Reply, Task, hookimpl
from hetfl.models.normalization import NORMS

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


class Scaler(Plugin):
    """x / s at the input of every norm, or after each hidden layer of a model without norms; s: the share of units a client has.

    Where a client trains parts of its model apart (fjord's narrower batches, splitmix's bases), s is each part's own share.
    """

    stackable: ClassVar[bool] = True

    @hookimpl(wrapper=True, trylast=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        with ExitStack() as scaled:
            for model, sizes in {task.model: task.plan_sizes, **task.parts}.items():
                scaled.enter_context(scale_activations(model, width_ratio(sizes, task.full_sizes)))
            return (yield)


def width_ratio(sizes: Mapping[str, int], full: Mapping[str, int]) -> float:
    """The width ratio that a model of `sizes` really has: its units over all units; 1 with an architecture of its own."""
    kept = sum(sizes.get(name, 0) for name in full)
    return kept / sum(full.values()) if kept else 1.0


@contextmanager
def scale_activations(model: nn.Module, s: float) -> Generator[None, None, None]:
    """In training, x / s at the input of every norm; without norms, at the output of all weighted layers but the last (2.3).

    (x / s - m / s) / sqrt(v / s^2 + eps) = (x - m) / sqrt(v + s^2 eps): a norm gets s^2 eps instead of x / s, and so the running
    statistics that it tracks in training are those of x, which evaluation needs.
    """
    norms = {m: m.eps for m in model.modules() if isinstance(m, NORMS)}
    layers = [] if norms else [m for m in model.modules() if isinstance(m, WEIGHTED)][:-1]

    def set_eps(m: Any, x: object) -> None:
        eps = norms[m]
        scaled = s * s * (torch.finfo(torch.float32).eps if eps is None else eps)
        m.eps = scaled if m.training else eps

    hooks = [m.register_forward_pre_hook(set_eps) for m in norms]
    hooks += [m.register_forward_hook(lambda m, _, out: out / s if m.training else None) for m in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm, eps in norms.items():
            norm.eps = eps
