"""Ops that only move data, run on channel ids in place of values, and slices that follow the channels they are taken from."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hetfl.submodel.tracing.channels import read_along, varying_dims
from hetfl.submodel.tracing.sizes import TracedInt
from hetfl.submodel.tracing.table import ChannelTable


def run_move(name: str, source: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """What the op `name` gives of the ids `source`, of one tensor or several, with the rest of the arguments of its call."""
    name = {"view": "reshape"}.get(name, name)
    given = [args[1].shape] if name.endswith("_as") else args[1:]
    moved = find_move(name, isinstance(source, Tensor))(source, *given, **kwargs)
    return list(moved) if isinstance(moved, tuple | list) else [moved]


def find_move(name: str, single: bool) -> Callable[..., Any]:
    """The function that moves data as the op `name` does, of one tensor or of several."""
    if name in ("T", "mT", "H"):
        return lambda source: getattr(source, name)
    name = name.removesuffix("_as")
    own = getattr(torch.Tensor, name, None) if single else None
    found: Callable[..., Any] = own or getattr(torch, name, None) or getattr(torch.nn.functional, name)
    return found


def follow_slices(table: ChannelTable, ids: Tensor, index: Any) -> bool:
    """Ties the channels of `ids` so that `x[index]` takes corresponding ones when they are cut; whether it does.

    Every dim of channels must be whole, strided (`x[..., ::2]`: channels side by side are cut together) or bounded by sizes that
    follow the channels (`x[..., : self.dim]`, `x[..., x.shape[-1] // 2 :]`: all pieces of that size are cut alike).
    """
    index = [i for i in (index if isinstance(index, tuple) else (index,)) if i is not None]
    if any(isinstance(i, Tensor | list) for i in index):
        return False
    after = index[index.index(...) + 1 :] if ... in index else []
    dims = dict(enumerate(index[: index.index(...)] if ... in index else index))
    dims |= {ids.ndim - len(after) + i: at for i, at in enumerate(after)}
    roots = table.find(ids)
    return all(_follow_slice(table, read_along(roots, d), dims[d]) for d in varying_dims(roots) if d in dims)


def _follow_slice(table: ChannelTable, line: Tensor | None, at: Any) -> bool:
    """As `follow_slices`, for the channels along one dim."""
    if line is None or not isinstance(at, slice):
        return False
    bounds = [b for b in (at.start, at.stop) if b is not None and b != 0]
    step = at.step or 1
    if step > 1 and (at.start or 0) < step and at.stop is None and len(line) % step == 0:
        table.tie(line.reshape(-1, step)[:, :1], line.reshape(-1, step))
        return True
    if step != 1 or not all(isinstance(b, TracedInt) for b in bounds):
        return False
    each = math.gcd(len(line), *(int(b) // b.share.numerator for b in bounds))
    table.tie(line.reshape(-1, each)[:1], line.reshape(-1, each))
    for bound in bounds:
        table.bind(bound, line[:each].repeat(int(bound) // each))
    return True
