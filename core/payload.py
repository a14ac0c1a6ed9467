"""What travels: its size in bytes, and the check of what comes back."""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from hetfl.core.types import Extra, Reply
from hetfl.core.widths import State


def size(state: Mapping[str, Tensor]) -> int:
    """Bytes of `state` as Flower's ArrayRecord encodes it: the .npy form of every tensor, and its name."""
    return sum(len(name.encode()) + header(t.dtype, tuple(t.shape)) + t.numel() * t.element_size() for name, t in state.items())


@cache
def header(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    buffer = io.BytesIO()
    numpy_dtype = torch.empty(0, dtype=dtype).numpy().dtype
    fields = {"descr": npy.dtype_to_descr(np.dtype(numpy_dtype)), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(buffer, fields)
    return buffer.tell()


def fault(reply: Reply, sent: State, allowed: Mapping[str, Extra]) -> str | None:
    """Why a reply cannot be used, or None: it must hold the tensors that were sent, finite, and only declared extras."""
    if set(reply.state) != set(sent):
        odd = sorted(set(reply.state) ^ set(sent))
        return f"its tensors are not those that were sent ({', '.join(odd[:3])})"
    for name, tensor in reply.state.items():
        expected = sent[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            got, wanted = (f"{tuple(t.shape)} {t.dtype}" for t in (tensor, expected))
            return f"tensor {name} is {got}, not {wanted}"
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return f"tensor {name} holds NaN or infinity"
    return undeclared(reply.extras, allowed)


def undeclared(extras: State, allowed: Mapping[str, Extra]) -> str | None:
    """What is wrong with the extras of a plan or a reply, or None."""
    for name, extra in extras.items():
        if name not in allowed or not allowed[name].admits(extra):
            return f"extra '{name}' is undeclared or larger than declared"
    return None
