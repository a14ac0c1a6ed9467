"""Tensors as they travel: values without masked entries, and their size in bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from hetfl.models.state import State

BITS = "/mask"  # what follows a tensor's name in the name of its mask's bits

TRAVELS = (torch.float16, torch.float32, torch.float64, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool)

MEAN, VARIANCE = STATISTICS = ("running_mean", "running_var")  # what the names of batch norm's running statistics end with


def list_updated(state: Mapping[str, Tensor]) -> list[str]:
    """The tensors whose UPDATE travels where a codec takes it: floating point, without running statistics, which may not drift."""
    return [name for name, t in state.items() if t.is_floating_point() and not name.endswith(STATISTICS)]


def payload_bytes(
    state: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None, *beside: Mapping[str, Tensor], positions: bool = True
) -> int:
    """Bytes of `state`, and of what travels `beside` it, as Flower's ArrayRecord encodes them: the .npy form of every tensor, and
    its name.

    A tensor of `state` with a mask is sent as the values that exist and, with `positions`, a bit for each entry
    (`select_existing`, `pack_bits`).
    """
    masks = masks or {}
    more = sum(entry_bytes(name, tensor, None, positions) for each in beside for name, tensor in each.items())
    return more + sum(entry_bytes(name, tensor, masks.get(name), positions) for name, tensor in state.items())


def entry_bytes(name: str, tensor: Tensor, mask: Tensor | None, positions: bool) -> int:
    """Bytes of one tensor as `payload_bytes` counts them."""
    shape = tuple(tensor.shape) if mask is None else (int(mask.sum()),)
    return array_bytes(name, tensor.dtype, shape) + (0 if mask is None or not positions else mask_bytes(name, mask))


def mask_bytes(name: str, mask: Tensor) -> int:
    """Bytes of a mask, a bit an entry."""
    return array_bytes(name + BITS, torch.uint8, (math.ceil(mask.numel() / 8),))


def array_bytes(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of one array: name, .npy header, values."""
    return len(name.encode()) + header_bytes(dtype, shape) + math.prod(shape) * dtype.itemsize


def select_existing(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> State:
    """`state` with the values that exist, (number,), in place of each tensor that has a mask (bool, of its shape)."""
    return {name: t[masks[name]] if name in masks else t for name, t in state.items()}


def fill_masked(values: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> State:
    """The inverse of `select_existing`: entries that do not exist are 0. Raises ValueError where values are too few or many."""
    state = dict(values)
    for name in masks.keys() & state.keys():
        existing, mask = state[name], masks[name]
        if existing.ndim != 1 or len(existing) != int(mask.sum()):
            raise ValueError(f"tensor {name} has values of shape {tuple(existing.shape)} for a mask of {int(mask.sum())} entries")
        state[name] = torch.zeros(mask.shape, dtype=existing.dtype)
        state[name][mask] = existing
    return state


def pack_bits(mask: Tensor) -> Tensor:
    """A bool tensor as bits, eight to a byte: uint8, (ceil(entries / 8),)."""
    return torch.from_numpy(np.packbits(mask.numpy()))


def unpack_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack_bits`: a bool tensor of `shape`."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=math.prod(shape))).bool().reshape(shape)


@cache
def header_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of the header of a .npy file (version 1.0) of such an array."""
    buffer = io.BytesIO()
    numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
    fields = {"descr": npy.dtype_to_descr(np.dtype(numpy_dtype)), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(buffer, fields)
    return buffer.tell()
