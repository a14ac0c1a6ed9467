"""What travels: its size in bytes, and the check of what comes back."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from hetfl.core.types import Extra, Reply
from hetfl.core.widths import State

BITS = "/mask"


def size(state: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None, *, positions: bool = True) -> int:
    """Bytes of `state` as Flower's ArrayRecord encodes it: the .npy form of every tensor, and its name.

    A tensor with a mask is sent as the values that exist and, with `positions`, a bit for each entry (`entries`, `pack`).
    """
    masks = masks or {}
    return sum(entry(name, tensor, masks.get(name), positions) for name, tensor in state.items())


def entry(name: str, tensor: Tensor, mask: Tensor | None, positions: bool) -> int:
    if mask is None:
        return named(name, tensor.dtype, tuple(tensor.shape))
    bits = named(name + BITS, torch.uint8, (math.ceil(mask.numel() / 8),)) if positions else 0
    return named(name, tensor.dtype, (int(mask.sum()),)) + bits


def named(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return len(name.encode()) + header(dtype, shape) + math.prod(shape) * dtype.itemsize


def entries(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> State:
    """`state` as it travels: of a tensor with a mask the values that exist, in order."""
    return {name: t[masks[name]] if name in masks else t for name, t in state.items()}


def spread(travelled: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> State:
    """The inverse of `entries`: entries that do not exist are 0. Raises ValueError where values are too few or many."""
    state = dict(travelled)
    for name in masks.keys() & state.keys():
        values, mask = state[name], masks[name]
        if values.ndim != 1 or len(values) != int(mask.sum()):
            raise ValueError(f"tensor {name} has values of shape {tuple(values.shape)} for a mask of {int(mask.sum())} entries")
        state[name] = torch.zeros(mask.shape, dtype=values.dtype)
        state[name][mask] = values
    return state


def pack(mask: Tensor) -> Tensor:
    """A bool tensor as bits, eight to a byte."""
    return torch.from_numpy(np.packbits(mask.numpy()))


def unpack(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=math.prod(shape))).bool().reshape(shape)


@cache
def header(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    buffer = io.BytesIO()
    numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
    fields = {"descr": npy.dtype_to_descr(np.dtype(numpy_dtype)), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(buffer, fields)
    return buffer.tell()


def misfit(kept: Mapping[str, Tensor], sizes: Mapping[str, int]) -> str | None:
    """Why what a reply says it kept of the groups cannot be: units that were not sent; or None."""
    for group, units in kept.items():
        if group not in sizes or not isinstance(units, Tensor) or units.dtype != torch.int64 or units.ndim != 1:
            return f"what it kept of '{group}' is no list of units of a group"
        if not 0 < len(units) == len(units.unique()) or int(units.min()) < 0 or int(units.max()) >= sizes[group]:
            return f"it kept units of group '{group}' that it was not sent"
    return None


def unmasked(masks: Mapping[str, Tensor], before: Mapping[str, Tensor], state: State) -> str | None:
    """Why the masks of a reply cannot be: of other tensors or shapes than `state`'s, or wider than those `before`; or None."""
    for name, mask in masks.items():
        if name not in state or not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != state[name].shape:
            return f"its mask of '{name}' is no mask of a tensor that it was sent"
        if name in before and bool((mask & ~before[name]).any()):
            return f"its mask of '{name}' is wider than the one that was sent"
    return None


def fault(reply: Reply, sent: State, allowed: Mapping[str, Extra]) -> str | None:
    """Why a reply cannot be used, or None: it must hold the tensors of `sent`, finite, and only declared extras."""
    if set(reply.state) != set(sent):
        odd = sorted(set(reply.state) ^ set(sent))
        return f"its tensors are not those that were sent ({', '.join(odd[:3])})"
    for name, tensor in reply.state.items():
        expected = sent[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            got, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, expected))
            return f"tensor {name} is {got}, not {wanted}"
        if tensor.is_floating_point() and not finite(tensor):
            return f"tensor {name} holds NaN or infinity"
    return undeclared(reply.extras, allowed)


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; a finite sum says so at once."""
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def undeclared(extras: State, allowed: Mapping[str, Extra]) -> str | None:
    """What is wrong with the extras of a plan or a reply, or None."""
    for name, extra in extras.items():
        if name not in allowed or not allowed[name].admits(extra):
            return f"extra '{name}' is undeclared or larger than declared"
    return None
