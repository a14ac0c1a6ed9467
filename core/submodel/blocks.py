"""Blocks of tensors: the positions along some dims that a submodel has, for reading, writing and adding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class Index(dict[int, Tensor]):
    """dim -> positions, int64 (number,); a dim that is not there is whole. What is derived from the positions is cached."""

    @classmethod
    def of(cls, index: Mapping[int, Tensor]) -> Index:
        return index if isinstance(index, Index) else cls(index)

    @cached_property
    def leads(self) -> bool:
        """Whether the block is a leading part of the tensor along every dim, so that reading it needs no copy."""
        return all(is_leading(where) for where in self.values())

    @cached_property
    def _slices(self) -> dict[int, tuple[slice, ...]]:
        return {}

    def slices(self, ndim: int) -> tuple[slice, ...]:
        """The slices that address a leading block in a tensor of `ndim` dims."""
        if ndim not in self._slices:
            self._slices[ndim] = tuple(slice(0, len(self[d])) if d in self else slice(None) for d in range(ndim))
        return self._slices[ndim]

    @cached_property
    def _rows(self) -> dict[tuple[int, ...], Tensor]:
        return {}

    def rows(self, shape: torch.Size) -> Tensor:
        """The rows of a block of dims 0 and 1 in a tensor of `shape` whose first max(dim) + 1 dims are flattened, (number,).

        Example: positions 1, 3 of dim 0 and 0, 2 of dim 1 in shape (4, 5, 3, 3): rows 5, 7, 15, 17 of (20, 9).
        """
        sides = tuple(shape[: max(self) + 1])
        if sides not in self._rows:
            first = self.get(0, torch.arange(sides[0]))
            self._rows[sides] = first if len(sides) == 1 else (first[:, None] * sides[1] + self[1]).flatten()
        return self._rows[sides]

    def add(self, total: Tensor, values: Tensor | float, weight: float = 1.0) -> None:
        """total[block] += weight * values, in place; `total` is contiguous."""
        if self.leads:
            total[cells(self, total)].add_(values, alpha=weight)
        elif max(self) < 2:
            flat = total.view(-1, math.prod(total.shape[max(self) + 1 :]))
            rows = self.rows(total.shape).to(total.device)
            mine = flat.index_select(0, rows)
            flat.index_copy_(0, rows, mine.add_(values.reshape(mine.shape) if isinstance(values, Tensor) else values, alpha=weight))
        else:
            total[cells(self, total)] += values * weight


def is_leading(positions: Tensor) -> bool:
    """Whether `positions` are 0, 1, 2, …; those of heads that keep different units (positions, heads) are not."""
    return (
        positions.ndim == 1
        and bool(len(positions))
        and int(positions[0]) == 0
        and bool((positions == torch.arange(len(positions))).all())
    )


def take(tensor: Tensor, index: Mapping[int, Tensor]) -> Tensor:
    """The block of `tensor` at `index`; where all of its positions are leading ones it is a view."""
    index = Index.of(index)
    for dim, where in index.items():
        tensor = (
            tensor.narrow(dim, 0, len(where))
            if index.leads or is_leading(where)
            else tensor.index_select(dim, where.to(tensor.device))
        )
    return tensor


def take_blocks(state: Mapping[str, Tensor], index: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Tensor]:
    """`take` for each tensor of `state` at its own `index`; one without an index is whole."""
    return {name: take(tensor, index[name]) if name in index else tensor for name, tensor in state.items()}


def view_blocks(tensors: Sequence[Tensor], index: Sequence[Mapping[int, Tensor]]) -> list[Tensor]:
    """Views of the leading blocks of `tensors`, each at its `index`."""
    return [tensor[cells(where, tensor)] for tensor, where in zip(tensors, index, strict=True)]


def put(small: Tensor, index: Mapping[int, Tensor], like: Tensor) -> Tensor:
    """A copy of `like` with `small` in the block at `index`: `take` of it gives `small` back."""
    full = like.clone()
    full[cells(index, like)] = small.to(like)
    return full


def cells(index: Mapping[int, Tensor], like: Tensor) -> tuple[Any, ...]:
    """What addresses the block at `index` in a tensor of the shape of `like`: `x[cells(index, x)]`, to read or to assign."""
    index = Index.of(index)
    if index.leads:
        return index.slices(like.ndim)
    lines = [index[d] if d in index else torch.arange(like.shape[d]) for d in range(like.ndim)]
    return torch.meshgrid(*lines, indexing="ij") if like.ndim else ()
