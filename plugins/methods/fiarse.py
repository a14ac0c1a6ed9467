"""FIARSE (Wu et al., NeurIPS 2024): the largest weights are the submodel, and training respects their threshold (spec fiarse)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.func import functional_call

from hetfl import Client, ExtraSpec, Field, Merged, Plan, Plugin, Reply, Server, State, Task, Update, hookimpl, running_mean
from hetfl.aggregation.updates import by_client
from hetfl.models.normalization import list_prunable
from hetfl.submodel.units import mean_powers, select_units


class FIARSE(Plugin):
    """A client of parameter budget gamma (its width squared) gets the gamma share of entries with the largest magnitude.

    Norm layers are neither counted nor masked. `neuron` keeps whole units in place of entries: a submodel that is really small.
    """

    extras_down: ClassVar[dict[str, ExtraSpec]] = {"thresholds": ExtraSpec(1 << 16)}

    by: Literal["model", "layer", "neuron"] = Field("model", description="one threshold, one a stage, or whole units by mean |w|")
    biased: bool = Field(True, description="the threshold-controlled gradient; without it, the gradient on the kept entries")
    _thresholds: dict[float, State] = PrivateAttr(default_factory=dict)

    @property
    def inactive_hooks(self) -> tuple[str, ...]:
        return () if self.biased and self.by != "neuron" else ("fit",)

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        """Takes the submodels anew from the current global model, one for each budget (spec 1)."""
        names, whole = list_prunable(server.builder.model), server.select(torch.arange)
        if self.by == "neuron":
            values = mean_powers(server.widths, server.state, names)
            return [server.select(select_units(server.widths, values, c.profile.width)) for c in clients]
        weights = {name: server.state[name] for name in names if name in server.state}
        budgets = {client.profile.parameters for client in clients}
        self._thresholds = {gamma: find_thresholds(weights, gamma, self.by == "layer") for gamma in budgets}
        plans = {gamma: replace(whole, masks=make_masks(weights, theta)) for gamma, theta in self._thresholds.items()}
        return [plans[client.profile.parameters] for client in clients]

    @hookimpl
    def client_extras(self, client: Client) -> State | None:
        theta = self._thresholds.get(client.profile.parameters, {})
        return {"thresholds": torch.stack(list(theta.values()))} if theta else None

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        if self.biased and "thresholds" in task.extras:
            names = [name for name in list_prunable(task.model) if name in task.masks]
            task.forward = make_forward(dict(zip(names, task.extras["thresholds"], strict=True)))
        return (yield)


class FIARSEMean(Plugin):
    """x - lr_g * the mean change of the clients whose submodel has the entry (spec 2); lr_g = 1 is the overlap mean."""

    rate: float = Field(1.0, gt=0, description="the server's learning rate lr_g")

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update]) -> Merged:
        new = running_mean(server.state, updates, by_client)
        if self.rate == 1:
            return Merged(new)
        old = server.state
        return Merged({n: old[n] + self.rate * (t - old[n]) if t.is_floating_point() else t for n, t in new.items()})


def find_thresholds(weights: Mapping[str, Tensor], gamma: float, each_stage: bool) -> State:
    """theta of every tensor: the int(gamma * N)-th largest magnitude (at least the first) of the model or of its stage."""
    stage = {name: name.split(".")[0] if each_stage else "" for name in weights}
    theta = {s: kth_largest([t for name, t in weights.items() if stage[name] == s], gamma) for s in set(stage.values())}
    return {name: theta[stage[name]] for name in weights}


def kth_largest(tensors: Sequence[Tensor], gamma: float) -> Tensor:
    """The int(gamma * N)-th largest magnitude of the N entries of all tensors, at least the first. Example: of 1, -4, 2, 3 with
    gamma 0.5, 3."""
    magnitudes = torch.cat([t.abs().flatten() for t in tensors]).numpy()
    k = max(1, int(gamma * len(magnitudes) + 1e-9))
    place = len(magnitudes) - k
    return torch.tensor(np.partition(magnitudes, place)[place])  # a third of the time of torch.kthvalue


def make_masks(weights: Mapping[str, Tensor], theta: Mapping[str, Tensor]) -> State:
    """1[|w| >= theta]; ties may keep more than k entries (spec 2)."""
    return {name: tensor.abs() >= theta[name] for name, tensor in weights.items()}


class Threshold(torch.autograd.Function):
    """w 1[|w| >= theta], with the gradient g 1[|w| >= theta] (1 + 2 |w| theta / (|w| + theta)^2) (spec 2, paper eq. 3)."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(w, theta)
        return w * (w.abs() >= theta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        w, theta = ctx.saved_tensors
        return grads[0] * gradient_factor(w, theta), None


apply_threshold: Callable[[Tensor, Tensor], Tensor] = Threshold.apply


def gradient_factor(w: Tensor, theta: Tensor) -> Tensor:
    """What the gradient of a kept entry is multiplied by, in [1, 1.5]; 0 for the others; 1 where w and theta are 0 (O5)."""
    s = w.abs()
    return (s >= theta) * (1 + torch.nan_to_num(2 * s * theta / (s + theta) ** 2, 0.0, 0.0))


def make_forward(theta: Mapping[str, Tensor]) -> Callable[[nn.Module, Tensor], Any]:
    """A forward pass on thresholded weights; theta stays fixed, so within a round masks only shrink."""

    def forward(model: nn.Module, x: Tensor) -> Any:
        weights = {name: apply_threshold(p, theta[name]) for name, p in model.named_parameters() if name in theta}
        return functional_call(model, weights, (x,))

    return forward
