"""Tensors of channel ids: beside an activation, a LongTensor of its shape that says which channel each element belongs to.

An id of -1 stands for no channel. Ids are stored sparingly: a dim along which they do not vary has stride 0 or size 1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def op_name(func: Any) -> str:
    """The name of a torch function or tensor method; of a property (`x.shape`, `x.T`) the property's."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def compact(ids: Tensor) -> Tensor:
    """Drops the repetition along dims of stride 0: the same ids in as few elements as they are stored in."""
    for dim, (size, stride) in enumerate(zip(ids.shape, ids.stride(), strict=True)):
        if stride == 0 and size > 1:
            ids = ids.narrow(dim, 0, 1)
    return ids


def narrow_constant_dims(ids: Tensor) -> Tensor:
    """The same ids with size 1 along every dim along which they do not vary."""
    for dim, size in enumerate(ids.shape):
        if size > 1 and not varies(ids, dim):
            ids = ids.narrow(dim, 0, 1)
    return ids


def varies(ids: Tensor, dim: int) -> bool:
    """Whether two positions along `dim` bear different channels."""
    if ids.shape[dim] < 2 or ids.stride(dim) == 0:
        return False
    stored = compact(ids)
    return bool((stored != stored.narrow(dim, 0, 1)).any())


def varying_dims(ids: Tensor) -> list[int]:
    """The dims along which the channels vary, in ascending order."""
    return [d for d in range(ids.ndim) if varies(ids, d)]


def spans(a: Tensor, b: Tensor) -> bool:
    """Whether `b` has a full extent along every dim in which the channels of `a` vary (of which there is one at least)."""
    dims = varying_dims(a)
    return bool(dims) and all(b.shape[d] > 1 for d in dims)


def vary_apart(a: Tensor, b: Tensor) -> bool:
    """Whether the channels of `a` and of `b` both vary, and along no common dim."""
    first, second = (set(varying_dims(x)) for x in (a, b))
    return bool(first and second and not first & second)


def place_along(ids: Tensor, ndim: int, dim: int) -> Tensor:
    """Ids of shape (size,) as a tensor of `ndim` dims that has them along `dim` and size 1 elsewhere."""
    shape = [1] * ndim
    shape[dim] = len(ids)
    return ids.reshape(shape)


def read_along(ids: Tensor, dim: int) -> Tensor | None:
    """The ids along `dim`, shape (size,), where they vary along it and along no other dim; else None."""
    if not varies(ids, dim) or any(varies(ids, d) for d in range(ids.ndim) if d != dim % ids.ndim):
        return None
    first = compact(ids.movedim(dim, 0))
    return first.reshape(len(first), -1)[:, 0].expand(ids.shape[dim])
