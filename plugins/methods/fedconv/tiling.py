"""How filters tile the tensors of a model: blocks of 2-D images, one image for each spatial tap (spec fedconv 2.1, 2.2).

A weight (out, in, a, b) is a * b images (out, in); a vector (n,) is one image (1, n). Along an axis of n positions of which m
remain, a kernel of n - m + 1 entries takes n to m (correlation) or m to n (transposed correlation). Example: 32 channels at width
0.75 are 24, so kernels have 9 entries. Where an axis joins the channels of several groups, each run of them has filters of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hetfl import Selection, State
from hetfl.submodel.blocks import take
from hetfl.submodel.widths import Axis

Shape = tuple[int, int]

MOST_PARTS = 64


@dataclass(frozen=True, eq=False)
class Part:
    """A run of positions of an axis, of which the first `kept` remain."""

    positions: Tensor
    kept: int


@dataclass(frozen=True, eq=False)
class Block:
    """The part of the tensor `name` that one set of filters (one a tap) works on, as images (taps, rows, columns).

    `conv`: whether the tensor is a convolution's weight.
    """

    name: str
    rows: Part
    columns: Part
    taps: int
    conv: bool = False

    @cached_property
    def large(self) -> Shape:
        return len(self.rows.positions), len(self.columns.positions)

    @cached_property
    def small(self) -> Shape:
        return self.rows.kept, self.columns.kept

    @cached_property
    def kernel(self) -> Shape:
        return self.large[0] - self.small[0] + 1, self.large[1] - self.small[1] + 1

    @cached_property
    def spectral(self) -> bool:
        """Whether correlation by Fourier transforms takes fewer operations than the direct sum (spec 2.10)."""
        direct = math.prod(self.small) * math.prod(self.kernel)
        area = math.prod(self.large)
        return direct > 12 * area * math.log2(area + 1)


def tile_parameters(selection: Selection, like: State, parameters: Sequence[str]) -> list[Block]:
    """The blocks of all `parameters`, which have the shapes of `like`, for the submodel `selection` of leading channels."""
    return [block for name in parameters for block in tile_tensor(selection, name, like[name])]


def tile_tensor(selection: Selection, name: str, tensor: Tensor) -> list[Block]:
    """The blocks of one tensor; none for one that is cut along a third dim, which is only sliced."""
    axes, index = selection.widths.axes.get(name, {}), dict(selection.index.get(name, {}))
    if max(axes, default=0) > 1:
        return []
    sides = [split_axis(axes.get(d), index.get(d), n) for d, n in enumerate(tensor.shape[:2])]
    rows, columns = sides if len(sides) == 2 else ([Part(torch.arange(1), 1)], sides[0])
    taps = math.prod(tensor.shape[2:])
    return [Block(name, r, c, taps, conv=tensor.ndim > 2) for r in rows for c in columns]


def split_axis(axis: Axis | None, index: Tensor | None, size: int) -> list[Part]:
    """An axis as runs whose remaining positions (those in `index`) lead.

    A run ends where the group changes or the unit number falls. An axis of more than MOST_PARTS runs is one part of the remaining
    positions alone: it is sliced instead of filtered.
    """
    if axis is None or index is None:
        return [Part(torch.arange(size), size)]
    breaks = (axis.group[1:] != axis.group[:-1]) | (axis.unit[1:] < axis.unit[:-1])
    runs = torch.arange(size).tensor_split((breaks.nonzero().squeeze(1) + 1).tolist())
    if len(runs) > MOST_PARTS:
        return [Part(index, len(index))]
    remains = torch.isin(torch.arange(size), index)
    return [Part(run, int(remains[run].sum())) for run in runs]


def cut_large_images(block: Block, large: Tensor) -> Tensor:
    """The block of a global tensor as images (taps, rows, columns)."""
    return to_images(large, block.rows.positions, block.columns.positions)


def cut_small_images(block: Block, small: Tensor, selection: Selection) -> Tensor:
    """The block of a client's tensor as images (taps, remaining rows, remaining columns)."""
    index = dict(selection.index.get(block.name, {}))

    def locate(part: Part, dim: int) -> Tensor:
        """Where the remaining positions of a part lie in the client's tensor."""
        remaining = part.positions[: part.kept]
        return torch.isin(index[dim], remaining).nonzero().squeeze(1) if dim in index else torch.arange(small.shape[dim])

    if small.ndim == 1:
        return to_images(small, torch.arange(1), locate(block.columns, 0))
    return to_images(small, locate(block.rows, 0), locate(block.columns, 1))


def to_images(tensor: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`tensor` at `rows` and `columns` as images (taps, rows, columns)."""
    if tensor.ndim == 1:
        return take(tensor, {0: columns})[None, None]
    block = take(tensor, {0: rows, 1: columns})
    return block.reshape(*block.shape[:2], -1).permute(2, 0, 1)


def to_tensor(images: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_images` for a block that is the whole of `like`."""
    return images.permute(1, 2, 0).reshape(like.shape) if like.ndim > 1 else images.reshape(like.shape)


def join_blocks(blocks: Sequence[Block], images: Sequence[Tensor], like: State) -> State:
    """The small tensors, in the shapes of `like`, from the small images of all their blocks."""
    of_tensor: dict[str, list[tuple[Block, Tensor]]] = {}
    for block, image in zip(blocks, images, strict=True):
        of_tensor.setdefault(block.name, []).append((block, image))
    joined: State = {}
    for name, pieces in of_tensor.items():
        rows: dict[int, list[Tensor]] = {}
        for block, image in pieces:
            rows.setdefault(id(block.rows), []).append(image)
        whole = pieces[0][1] if len(pieces) == 1 else torch.cat([torch.cat(row, dim=2) for row in rows.values()], dim=1)
        joined[name] = to_tensor(whole, like[name])
    return joined


def place_block(block: Block, images: Tensor, so_far: Tensor | None, like: Tensor) -> Tensor:
    """`so_far` (None: zeros), in the shape of `like`, with the large images (taps, rows, columns) at the block's positions."""
    if so_far is None and block.large == (like.shape[0] if like.ndim > 1 else 1, like.shape[min(1, like.ndim - 1)]):
        return to_tensor(images, like)
    full = torch.zeros_like(like) if so_far is None else so_far.clone()
    if like.ndim == 1:
        return full.index_copy(0, block.columns.positions, images.reshape(-1))
    values = images.permute(1, 2, 0).reshape(*block.large, *like.shape[2:])
    rows = full.index_select(0, block.rows.positions).index_copy(1, block.columns.positions, values)
    return full.index_copy(0, block.rows.positions, rows)
