"""Labels of units: how they are stored, whether they vary along a dim."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def name_of(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def compact(labels: Tensor) -> Tensor:
    """Drops repetition along dims of stride 0: the same labels in as few elements as they are stored."""
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if stride == 0 and size > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def thin(labels: Tensor) -> Tensor:
    """The same labels with size 1 along every dim along which they do not vary."""
    for dim, size in enumerate(labels.shape):
        if size > 1 and not varies(labels, dim):
            labels = labels.narrow(dim, 0, 1)
    return labels


def varies(labels: Tensor, dim: int) -> bool:
    if labels.shape[dim] < 2 or labels.stride(dim) == 0:
        return False
    slim = compact(labels)
    return bool((slim != slim.narrow(dim, 0, 1)).any())


def spans(a: Tensor, b: Tensor) -> bool:
    """Whether `b` has a full extent along every dim in which the units of `a` vary."""
    dims = [d for d in range(a.ndim) if varies(a, d)]
    return bool(dims) and all(b.shape[d] > 1 for d in dims)


def apart(a: Tensor, b: Tensor) -> bool:
    """Whether the units of `a` and of `b` vary, and along no common dim."""
    first, second = ({d for d in range(x.ndim) if varies(x, d)} for x in (a, b))
    return bool(first and second and not first & second)


def channelwise(units: Tensor, ndim: int, dim: int) -> Tensor:
    shape = [1] * ndim
    shape[dim] = len(units)
    return units.reshape(shape)


def line_of(labels: Tensor, dim: int) -> Tensor | None:
    """The units along `dim`, shape (size,), where they vary along it and along no other dim."""
    if not varies(labels, dim) or any(varies(labels, d) for d in range(labels.ndim) if d != dim % labels.ndim):
        return None
    first = compact(labels.movedim(dim, 0))
    return first.reshape(len(first), -1)[:, 0].expand(labels.shape[dim])
