"""A perceptron of three residual blocks as a model, and its forward pass over named tensors."""

from __future__ import annotations

import torch
from torch import nn

BLOCKS = ("blocks.0", "blocks.1", "blocks.2")


class Block(nn.Module):
    def __init__(self, width=6, hidden=5):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class ResidualNet(nn.Module):
    """64-6, blocks 6-5-6, 6-classes."""

    def __init__(self, classes):
        super().__init__()
        self.inputs, self.blocks = nn.Linear(64, 6), nn.ModuleList(Block() for _ in BLOCKS)
        self.head = nn.Linear(6, classes)

    def forward(self, x):
        x = torch.relu(self.inputs(x.flatten(1)))
        for block in self.blocks:
            x = block(x)
        return self.head(x)


RESIDUAL = {"model": "helpers.residual:ResidualNet", "model_args": {}}


def forward(w, x):
    """The logits of the blocks whose tensors are among `w`; a block with a tensor `step` adds that share of itself."""
    x = torch.relu(x.flatten(1) @ w["inputs.weight"].T + w["inputs.bias"])
    for block in BLOCKS:
        if f"{block}.up.weight" in w:
            hidden = torch.relu(x @ w[f"{block}.up.weight"].T + w[f"{block}.up.bias"])
            x = x + w.get(f"{block}.step", 1.0) * (hidden @ w[f"{block}.down.weight"].T + w[f"{block}.down.bias"])
    return x @ w["head.weight"].T + w["head.bias"]


def keep(state, blocks):
    """`state` without the blocks that are not among `blocks`."""
    return {n: t for n, t in state.items() if not n.startswith("blocks") or n.startswith(tuple(f"{b}." for b in blocks))}


def pad(trained, like):
    """(values, coverage) in the shapes of `like`, both 0 where `trained` has no tensor."""
    values = {n: trained.get(n, torch.zeros_like(t)) for n, t in like.items()}
    return values, {n: torch.full_like(t, float(n in trained)) for n, t in like.items()}
