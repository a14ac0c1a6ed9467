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
CODES = {"fp16": torch.float16, "int8": torch.int8}
SCALE = 8 + len("scale/")  # bytes of a tensor's scale, beside its name


def coded(state: Mapping[str, Tensor], code: str) -> tuple[State, dict[str, float]]:
    """`state` with float32 tensors as fp16 or int8, and the scale of each: value = scale x what travels."""
    scales = {n: scale(t) if code == "int8" else 1.0 for n, t in state.items() if t.dtype == torch.float32 and code}
    return {n: shrunk(t, scales[n], code) if n in scales else t for n, t in state.items()}, scales


def scale(tensor: Tensor) -> float:
    """What one step of int8 stands for."""
    most = float(tensor.abs().amax()) if tensor.numel() else 0.0
    return most / 127 or 1.0


def shrunk(tensor: Tensor, scale: float, code: str) -> Tensor:
    if code == "fp16":
        return tensor.half()
    return (tensor / scale).nan_to_num().round().clamp(-127, 127).to(torch.int8) if math.isfinite(scale) else tensor.half()


def restored(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> State:
    """The inverse of `coded`, up to rounding."""
    return {n: t.float() * scales[n] if n in scales else t for n, t in state.items()}


def rounded(state: Mapping[str, Tensor], masks: Mapping[str, Tensor], code: str) -> State:
    """What arrives of `state` when it travels so."""
    masks = {name: mask for name, mask in masks.items() if name in state}
    return spread(restored(*coded(entries(state, masks), code)), masks)


def size(state: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None = None, *, positions: bool = True, code: str = "") -> int:
    """Bytes of `state` as Flower's ArrayRecord encodes it: the .npy form of every tensor, and its name.

    A tensor with a mask is sent as the values that exist and, with `positions`, a bit for each entry (`entries`, `pack`). With
    `code`, floating-point tensors travel so, each with its scale.
    """
    masks = masks or {}
    return sum(entry(name, tensor, masks.get(name), positions, code) for name, tensor in state.items())


def entry(name: str, tensor: Tensor, mask: Tensor | None, positions: bool, code: str = "") -> int:
    shape = tuple(tensor.shape) if mask is None else (int(mask.sum()),)
    dtype, scale = (CODES[code], SCALE + len(name.encode())) if code and tensor.dtype == torch.float32 else (tensor.dtype, 0)
    bits = named(name + BITS, torch.uint8, (math.ceil(mask.numel() / 8),)) if mask is not None and positions else 0
    return named(name, dtype, shape) + scale + bits


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
