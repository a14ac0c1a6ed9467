"""Blocks of tensors: the positions along some dims that a submodel holds, for reading, writing and adding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


class Index(dict[int, Tensor]):
    """dim -> positions; a dim that is not there is whole. What follows from the positions is found once and kept."""

    @classmethod
    def of(cls, index: Mapping[int, Tensor]) -> Index:
        return index if isinstance(index, Index) else cls(index)

    @cached_property
    def leads(self) -> bool:
        """Whether the block is the leading part of the tensor, so that it is a view."""
        return all(leading(where) for where in self.values())

    @cached_property
    def _slices(self) -> dict[int, tuple[slice, ...]]:
        return {}

    def slices(self, ndim: int) -> tuple[slice, ...]:
        """A leading block of a tensor of `ndim` dims."""
        if ndim not in self._slices:
            self._slices[ndim] = tuple(slice(0, len(self[d])) if d in self else slice(None) for d in range(ndim))
        return self._slices[ndim]

    @cached_property
    def _rows(self) -> dict[tuple[int, ...], Tensor]:
        return {}

    def rows(self, shape: torch.Size) -> Tensor:
        """Of an index on the first two dims alone: where its rows lie in a tensor of `shape` with these dims flattened."""
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
            rows = self.rows(total.shape)
            mine = flat.index_select(0, rows)
            flat.index_copy_(0, rows, mine.add_(values.reshape(mine.shape) if isinstance(values, Tensor) else values, alpha=weight))
        else:
            total[cells(self, total)] += values * weight


def leading(where: Tensor) -> bool:
    return bool(len(where)) and int(where[0]) == 0 and bool((where == torch.arange(len(where))).all())


def take(tensor: Tensor, index: Mapping[int, Tensor]) -> Tensor:
    """The entries of `tensor` at `index` along each of its dims; a leading run of positions is a view."""
    index = Index.of(index)
    for dim, where in index.items():
        tensor = tensor.narrow(dim, 0, len(where)) if index.leads or leading(where) else tensor.index_select(dim, where)
    return tensor


def put(small: Tensor, index: Mapping[int, Tensor], like: Tensor) -> Tensor:
    """`like` with the entries at `index` replaced by `small`; the inverse of `take` there."""
    full = like.clone()
    full[cells(index, like)] = small.to(like)
    return full


def cells(index: Mapping[int, Tensor], like: Tensor) -> tuple[Any, ...]:
    """Indices that address the block `index` of a tensor of the shape of `like`, for reading or assignment."""
    index = Index.of(index)
    if index.leads:
        return index.slices(like.ndim)
    lines = [index[d] if d in index else torch.arange(like.shape[d]) for d in range(like.ndim)]
    return torch.meshgrid(*lines, indexing="ij") if like.ndim else ()
