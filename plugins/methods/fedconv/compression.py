"""Compression: filters turn the global model into a size class's small one (spec fedconv 2.3).

For each image x of a block, MLR(K * (p x + q + r x)) where * is the valid correlation and r is 1 with the residual, else 0.
Example: x = 0 … 15 as (4, 4), K all 1/4 (2, 2), p = q = 0, r = 1 gives the (3, 3) means [[2.5, 3.5, 4.5], …] of each 2 x 2 square.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from hetfl import Patch, Selection, State
from hetfl.plugins.methods.fedconv.fast import fast_form
from hetfl.plugins.methods.fedconv.filters import Filters, Weights, mlr, residual_of, weight_norm
from hetfl.plugins.methods.fedconv.tiling import Block, cut_large_images, join_blocks

Form = Callable[[Sequence[Weights]], list[Tensor]]  # from the weights of all blocks to their small images, before the MLR


def plain_form(blocks: Sequence[Block], images: Sequence[Tensor], residuals: Sequence[float]) -> Form:
    """Compression as the paper has it, differentiated by autograd: K * ((r + p) x + q) for the images x of every block."""

    def compress(weights: Sequence[Weights]) -> list[Tensor]:
        small = []
        for block, x, r, (p, q, g, v) in zip(blocks, images, residuals, weights, strict=True):
            small.append(correlate((r + p)[:, None, None] * x + q[:, None, None], weight_norm(g, v), block))
        return small

    return compress


def correlate(x: Tensor, k: Tensor, block: Block) -> Tensor:
    """The valid correlation of each tap's image (taps, rows, columns) with its kernel (taps, kr, kc): (taps, *block.small)."""
    if not block.spectral:
        return F.conv2d(x[None], k[:, None], groups=block.taps)[0]
    circular: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * torch.fft.rfft2(k, s=block.large).conj(), s=block.large)
    return circular[:, : block.small[0], : block.small[1]]


class Compressor:
    """Filters over one fixed global state, whose images are cut once and then compressed again and again while filters are trained.

    `times`: how often the MLR is applied; `residual`: see `residual_of`; `form`: `plain_form`, or `fast_form`, which is the same up
    to rounding.
    """

    def __init__(
        self, filters: Filters, state: State, times: int = 0, residual: str = "all",
        form: Callable[[Sequence[Block], Sequence[Tensor], Sequence[float]], Form] = fast_form,
    ) -> None:  # fmt: skip
        self.filters, self.state, self.times = filters, state, times
        images = [cut_large_images(b, state[b.name]) for b in filters.blocks]
        self.form = form(filters.blocks, images, [residual_of(b, residual) for b in filters.blocks])

    def __call__(self) -> State:
        """The small tensors, differentiable in the filters' weights; those without filters are sliced."""
        plain = self.filters.selection.take(self.state)
        return plain | join_blocks(self.filters.blocks, self.pieces(), plain) if self.filters.active else plain

    def pieces(self) -> list[Tensor]:
        """The small images (taps, remaining rows, remaining columns) of every block."""
        return [mlr(y, self.times) for y in self.form(self.filters.weights)]


@dataclass(frozen=True, eq=False)
class CompressedPlan:
    """The plan of a size class: its filters applied to the global state; updates belong to the leading channels."""

    selection: Selection
    filters: Filters
    times: int
    residual: str
    model: str | None = None
    masks: State = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        return self.selection.sizes

    def take(self, state: State) -> State:
        return {name: tensor.detach() for name, tensor in Compressor(self.filters, state, self.times, self.residual)().items()}

    def put(self, trained: State) -> Mapping[str, Patch]:
        return self.selection.put(trained)

    def narrow(self, kept: Mapping[str, Tensor], masks: State) -> Selection:
        """What remains is no longer a transform of the whole: a plain part of the leading slice."""
        return self.selection.narrow(kept, masks)
