"""Dilation: a client's filters grow its small tensors to the global model's shapes (spec fedconv 2.1, 2.3).

For each small image x of a block, MLR(K^T (p x + q + r x)) where K^T is the transposed correlation, stride 1. Example: x = [[1, 2],
[3, 4]] with K all 1 (3, 3) gives the (4, 4) image [[1, 3, 3, 2], [4, 10, 10, 6], [4, 10, 10, 6], [3, 7, 7, 4]].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hetfl import State
from hetfl.plugins.methods.fedconv.filters import Filters, mlr, residual_of, weight_norm
from hetfl.plugins.methods.fedconv.tiling import Block, cut_small_images, place_block


def dilate(filters: Filters, small: State, like: State, times: int = 0, residual: str = "all", flat: Tensor | None = None) -> State:
    """`small` grown to the shapes of `like`; tensors without filters are left out.

    `flat`: weights to take in place of the filters' own, as here and in `dilate_coverage`.
    """
    grown: State = {}
    for block, (p, q, g, v) in zip(filters.blocks, filters.split(filters.flat if flat is None else flat), strict=True):
        x = cut_small_images(block, small[block.name], filters.selection)
        x = (residual_of(block, residual) + p)[:, None, None] * x + q[:, None, None]
        y = mlr(correlate_transposed(x, weight_norm(g, v), block), times)
        grown[block.name] = place_block(block, y, grown.get(block.name), like[block.name])
    return grown


def dilate_coverage(filters: Filters, like: State, flat: Tensor | None = None) -> State:
    """How much of each grown entry comes from the client: the same growth of ones with |K| (findings 6.5)."""
    grown: State = {}
    for block, (_, _, g, v) in zip(filters.blocks, filters.split(filters.flat if flat is None else flat), strict=True):
        ones = torch.ones(block.taps, *block.small)
        y = correlate_transposed(ones, weight_norm(g, v).abs(), block).clamp(min=0)
        grown[block.name] = place_block(block, y, grown.get(block.name), like[block.name])
    return grown


def correlate_transposed(x: Tensor, k: Tensor, block: Block) -> Tensor:
    """The transposed correlation of each tap's small image (taps, m, n) with its kernel (taps, kr, kc): (taps, *block.large)."""
    if not block.spectral:
        return F.conv_transpose2d(x[None], k[:, None], groups=block.taps)[0]
    whole: Tensor = torch.fft.irfft2(torch.fft.rfft2(x, s=block.large) * torch.fft.rfft2(k, s=block.large), s=block.large)
    return whole
