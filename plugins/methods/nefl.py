"""NeFL (Kang et al., 2023): width and depth at once, learnable step sizes, and parameters that each size has for itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from hetfl import Client, Field, Merged, Plan, Plugin, Server, State, Update, Updates, hookimpl, prefix
from hetfl.models.normalization import NORMS
from hetfl.plugins.methods.depth import list_blocks, merge_by_level, name_level
from hetfl.plugins.methods.scalefl import split_budget
from hetfl.submodel.tracing.residual import find_blocks

STEP = "step"  # of a residual block: how far it goes along what it adds


class NeFL(Plugin):
    """The leading channels of some residual blocks, the first ones of every stage; each block goes a learned step along its sum.

    A block is x + step (block(x) - x), step = 1 at first: Euler steps of an ODE, of which a shallow model takes fewer.
    """

    steps: bool = Field(True, description="step sizes are learned; otherwise they are 1")
    slack: float = Field(0.1, ge=0, lt=1, description="how far a submodel's parameters may be from the budget, as a share of it")
    _plans: dict[float, Plan] = PrivateAttr(default_factory=dict)

    @hookimpl
    def adapt_model(self, model: nn.Module, x: Tensor) -> nn.Module | None:
        if not self.steps:
            return None
        for name in find_blocks(model, x):
            block = model.get_submodule(name)
            block.register_parameter(STEP, nn.Parameter(torch.ones(())))
            block.register_forward_hook(go_step)
        return model

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        return [self._plan(server, client) for client in clients]

    def _plan(self, server: Server, client: Client) -> Plan:
        width = client.profile.width
        if width not in self._plans:
            blocks = order_by_stage(list_blocks(server), server.state)

            def cut(depth: int, ratio: float) -> Plan:
                return server.select(prefix(ratio), blocks=blocks[:depth])

            split = split_budget(client.profile.parameters, len(blocks), lambda h, s: server.share(cut(h, s)), self.slack)
            self._plans[width] = cut(*split)
        return self._plans[width]


class NeFedAvg(Plugin):
    """The mean over the clients that cover an entry; norms and step sizes among the clients of one size alone."""

    weighting: Literal["uniform", "samples"] = Field("uniform", description="one vote a client, or one an example")

    @hookimpl
    def base_state(self, server: Server, client: Client) -> State | None:
        return server.branch(name_level(server, client.id))

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update]) -> Merged:
        model = server.builder.model
        own = {f"{name}.{n}" for name, m in model.named_modules() if isinstance(m, NORMS) for n in m.state_dict()}
        own |= {f"{block}.{STEP}" for block in server.blocks}
        return merge_by_level(server, Updates(updates, server.state), lambda update: own, self.weighting)


def go_step(block: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
    """What a block answers when it goes one step: x + step (out - x)."""
    x, step = args[0], getattr(block, STEP)
    moved: Tensor = x + step * (out - x)
    return moved


def order_by_stage(blocks: Sequence[str], state: State) -> list[str]:
    """The blocks as they are kept: the first of every stage, then the second. A stage is a run of blocks with tensors alike."""
    stages: list[list[str]] = []
    shapes: dict[str, Any] = {}
    for block in blocks:
        shapes[block] = [(n.removeprefix(block), t.shape) for n, t in state.items() if n.startswith(f"{block}.")]
        if stages and shapes[stages[-1][-1]] == shapes[block]:
            stages[-1].append(block)
        else:
            stages.append([block])
    rank = {block: (i + 1) / len(stage) for stage in stages for i, block in enumerate(stage)}
    return sorted(blocks, key=rank.__getitem__)
