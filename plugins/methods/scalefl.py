"""ScaleFL (Ilhan et al., CVPR 2023): submodels narrower and shallower at once, with early exits (spec scalefl)."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor
from torch.nn import functional as F

from hetfl import Client, Field, Plan, Reply, Server, Task, hookimpl, prefix
from hetfl.models.early_exit import all_exits
from hetfl.plugins.methods.depth import EarlyExits
from hetfl.training.local import kl_divergence

Split = tuple[int, float]  # exits, width ratio

GRID = 1 / 128  # of the widths that are tried


class ScaleFL(EarlyExits):
    """The leading channels of the layers up to an exit; all exits train, the early ones also towards the deepest.

    A model may bring its exits (docs/strategies/scalefl.md); any other gets heads after its stages.
    """

    plans_by_width: ClassVar[bool] = True

    distill: float = Field(0.1, ge=0, description="weight of the early exits' divergence from the deepest (beta, gamma)")
    temperature: float = Field(3.0, gt=0, description="temperature of that divergence (tau)")
    form: Literal["code", "paper"] = Field("code", description="the loss as in the official code, or as in the paper's eq. 5")
    detach: bool = Field(True, description="no gradient into the deepest exit as a teacher")
    slack: float = Field(0.1, ge=0, lt=1, description="how far a submodel's parameters may be from the budget, as a share of it")
    warm: float = Field(0.25, ge=0, le=1, description="share of the rounds before exits are distilled")
    _plans: dict[float, Plan] = PrivateAttr(default_factory=dict)

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        return [self._plan(server, client.profile.width, client.profile.parameters) for client in clients]

    def _plan(self, server: Server, width: float, budget: float) -> Plan:
        if width not in self._plans:
            exits: int = server.builder.model.depth  # type: ignore[assignment]
            depth, ratio = split_budget(budget, exits, lambda h, s: server.share(server.select(prefix(s), exits=h)), self.slack)
            self._plans[width] = server.select(prefix(ratio), exits=depth)
        return self._plans[width]

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        weight = self.distill if task.round > self.warm * task.options.rounds else 0.0
        depth = int(task.model.depth)  # type: ignore[arg-type]
        form, t, kind = self.form, self.temperature, task.kind
        task.loss = lambda z, y: exit_loss(z.chunk(depth, 1), y, weight, t, form, self.detach, kind.loss, kind.divergence)
        with all_exits(task.model):
            return (yield)


def exit_loss(
    exits: Sequence[Tensor], y: Tensor, weight: float, t: float, form: str, detach: bool = True,
    supervise: Callable[..., Tensor] = F.cross_entropy, diverge: Callable[..., Tensor] = kl_divergence,
) -> Tensor:  # fmt: skip
    """The weighted losses of all exits, the deepest last (spec 2; oracle O1).

    paper: 1/(l(l+1)) sum_i i (weight t^2 KL + CE); code: twice that, KL averaged over classes too and not for the last exit.
    """
    last, deepest = exits[-1], len(exits)
    teacher = last.detach() if detach else last
    total = torch.zeros(())
    for i, z in enumerate(exits, 1):
        scale = 1 / z.shape[1] if form == "code" else 1.0
        divergence = weight * t * t * scale * diverge(z, teacher, t) if i < deepest else 0.0
        total = total + i * (supervise(z, y) + divergence)
    return total * (2 if form == "code" else 1) / (deepest * (deepest + 1))


def split_budget(budget: float, exits: int, cost: Callable[[int, float], float], slack: float = 0.1) -> Split:
    """(exits, width) of the least |depth - width| among all whose cost is within `slack` of the budget (spec 1 d; oracle O6).

    Cost grows with width, so for each depth these widths are an interval, and its point nearest to the depth is the best of them.
    The whole model is (all, 1). Where no split comes so close, the one nearest below the budget.
    """
    if budget >= 1:
        return exits, 1.0
    depths = range(1, exits + 1)
    widest = {h: find_widest(partial(cost, h), budget * (1 + slack)) for h in depths}
    narrowest = {h: find_widest(partial(cost, h), budget * (1 - slack), below=True) + GRID for h in depths}
    splits = [(h, min(max(h / exits, narrowest[h]), widest[h])) for h in depths if narrowest[h] <= widest[h]]
    if feasible := [(h, s) for h, s in splits if abs(cost(h, s) / budget - 1) <= slack]:
        return min(feasible, key=lambda split: abs(split[0] / exits - split[1]))
    below = [(h, find_widest(partial(cost, h), budget) or GRID) for h in depths]
    return min(below, key=lambda split: (cost(*split) > budget, abs(cost(*split) - budget)))


def find_widest(cost: Callable[[float], float], most: float, below: bool = False) -> float:
    """The largest multiple of GRID in [0, 1] that costs at most `most`, or `below` it; by halving, for cost grows with width."""
    low, high = 0, round(1 / GRID) + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = cost(middle * GRID) < most if below else cost(middle * GRID) <= most
        low, high = (middle, high) if fits else (low, middle)
    return low * GRID
