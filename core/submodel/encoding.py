"""Tensors as they travel: half or 8-bit precision, values without masked entries, and their size in bytes."""

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

CODES = {"fp16": torch.float16, "int8": torch.int8}

SCALE = 8 + len("scale/")  # bytes of a tensor's scale, beside its name


def encode_tensors(state: Mapping[str, Tensor], code: str) -> tuple[State, dict[str, float]]:
    """`state` with float32 tensors as `code` (fp16, int8; "": as they are) and the scale of each: value = scale x what travels."""
    scales = {n: find_int8_scale(t) if code == "int8" else 1.0 for n, t in state.items() if t.dtype == torch.float32 and code}
    return {n: encode_tensor(t, scales[n], code) if n in scales else t for n, t in state.items()}, scales


def find_int8_scale(tensor: Tensor) -> float:
    """The value of one step of int8, so that the largest entry is 127; 1 for a tensor of zeros."""
    most = float(tensor.abs().amax()) if tensor.numel() else 0.0
    return most / 127 or 1.0


def encode_tensor(tensor: Tensor, scale: float, code: str) -> Tensor:
    """tensor / scale as int8 or fp16; as fp16 too where the scale is not finite."""
    if code == "fp16":
        return tensor.half()
    return (tensor / scale).nan_to_num().round().clamp(-127, 127).to(torch.int8) if math.isfinite(scale) else tensor.half()


def decode_tensors(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> State:
    """The inverse of `encode_tensors`, up to rounding."""
    return {n: t.float() * scales[n] if n in scales else t for n, t in state.items()}


def simulate_transfer(state: Mapping[str, Tensor], masks: Mapping[str, Tensor], code: str) -> State:
    """What arrives of `state` when it travels as `code` without the entries that `masks` (bool, shaped like it) leave out."""
    masks = {name: mask for name, mask in masks.items() if name in state}
    return fill_masked(decode_tensors(*encode_tensors(select_existing(state, masks), code)), masks)


def payload_bytes(
    state: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None, *, positions: bool = True, code: str = ""
) -> int:
    """Bytes of `state` as Flower's ArrayRecord encodes it: the .npy form of every tensor, and its name.

    A tensor with a mask is sent as the values that exist and, with `positions`, a bit for each entry (`select_existing`,
    `pack_bits`). With `code`, float32 tensors travel so, each with its scale.
    """
    masks = masks or {}
    return sum(entry_bytes(name, tensor, masks.get(name), positions, code) for name, tensor in state.items())


def entry_bytes(name: str, tensor: Tensor, mask: Tensor | None, positions: bool, code: str = "") -> int:
    """Bytes of one tensor as `payload_bytes` counts them."""
    shape = tuple(tensor.shape) if mask is None else (int(mask.sum()),)
    dtype, scale = (CODES[code], SCALE + len(name.encode())) if code and tensor.dtype == torch.float32 else (tensor.dtype, 0)
    bits = array_bytes(name + BITS, torch.uint8, (math.ceil(mask.numel() / 8),)) if mask is not None and positions else 0
    return array_bytes(name, dtype, shape) + scale + bits


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
