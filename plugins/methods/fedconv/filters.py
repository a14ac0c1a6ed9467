"""FedConv's filters: for each tap of a block a projection p x + q and a kernel K = g V / ||V|| (spec fedconv 2.3, 2.4, 2.8)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hetfl import Selection, State
from hetfl.plugins.methods.fedconv.tiling import Block

POSITIVE, NEGATIVE = 0.85, 0.001

Weights = Sequence[Tensor]  # of one block: p, q, g (taps,) and V (taps, kr, kc)


def mlr(x: Tensor, times: int = 1) -> Tensor:
    """The modified leaky ReLU, `times` times: 0.85 x from 0 on, 0.001 x below (spec 2.4)."""
    for _ in range(times):
        x = torch.where(x >= 0, POSITIVE * x, NEGATIVE * x)
    return x


def weight_norm(g: Tensor, v: Tensor) -> Tensor:
    """The kernels K = g V / ||V||_F (taps, kr, kc), with one scale g for each tap (spec 2.3)."""
    scale: Tensor = g / v.flatten(1).norm(dim=1).clamp(min=1e-12)
    return scale[:, None, None] * v


def residual_of(block: Block, residual: str) -> float:
    """1 where the image x is added to its projection p x + q, else 0: "conv" adds it for convolutions alone, 1x1 too (spec 2.3)."""
    return float(residual == "all" or block.conv)


class Filters:
    """The filters of one size class (compressor) or of one client (dilator), one set for each of `blocks`.

    `flat` holds all that is trained in one vector, so that the optimiser has one tensor: p, q, g, V of one block after the other.
    `active` is False while the filters are their start, at which compression is the leading slice and dilation placement there:
    both are then left out.
    """

    def __init__(self, selection: Selection, blocks: Sequence[Block], weights: Sequence[Weights] | None = None) -> None:
        self.selection, self.blocks, self.active = selection, list(blocks), weights is not None
        self.flat = join_weights([start_as_slice(b) for b in self.blocks] if weights is None else weights)

    @property
    def weights(self) -> list[Weights]:
        """Views of p, q, g and V of every block."""
        return self.split(self.flat)

    def split(self, flat: Tensor) -> list[Weights]:
        """p, q, g and V of every block from a vector of the form of `flat`."""
        sizes = [n for b in self.blocks for n in (b.taps, b.taps, b.taps, b.taps * math.prod(b.kernel))]
        parts = flat.split(sizes)
        return [(*parts[4 * i : 4 * i + 3], parts[4 * i + 3].view(b.taps, *b.kernel)) for i, b in enumerate(self.blocks)]

    def randomise(self, generator: torch.Generator) -> None:
        """Draws the reference's random start (spec 2.8)."""
        self.flat, self.active = join_weights([draw_start(b, generator) for b in self.blocks]), True

    def copy(self) -> Filters:
        """The filters as they are now, for a plan that outlives further training."""
        other = copy.copy(self)
        other.flat = self.flat.detach().clone()
        return other

    def state_dict(self) -> State:
        return {f"{i}.{k}": w.detach() for i, block in enumerate(self.weights) for k, w in zip("pqgV", block, strict=True)}

    def load_state_dict(self, state: State) -> None:
        self.flat = join_weights([[state[f"{i}.{k}"] for k in "pqgV"] for i in range(len(self.blocks))])
        self.active = True


def join_weights(weights: Sequence[Weights]) -> Tensor:
    """One vector of all weights of all blocks, the inverse of `Filters.split`."""
    return torch.cat([w.flatten() for block in weights for w in block]) if weights else torch.zeros(0)


def start_as_slice(block: Block) -> Weights:
    """The start at which compression is the leading slice: p and q 0, g 1, V 1 at (0, 0) and 0 elsewhere."""
    v = torch.zeros(block.taps, *block.kernel)
    v[:, 0, 0] = 1
    return torch.zeros(block.taps), torch.zeros(block.taps), torch.ones(block.taps), v


def draw_start(block: Block, generator: torch.Generator) -> Weights:
    """The reference's start: V uniform in +-1 / sqrt(kr kc), g its norm, p and q uniform in +-1 (spec 2.8)."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    v = uniform(block.taps, *block.kernel) / math.sqrt(math.prod(block.kernel))
    return uniform(block.taps), uniform(block.taps), v.flatten(1).norm(dim=1), v
