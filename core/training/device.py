"""The device on which clients train and models are tested, and the precision of forward passes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from hetfl.config import RunOptions
from hetfl.errors import UsageError


def prepare_device(options: RunOptions) -> None:
    """Makes cuDNN choose algorithms that give the same bits every time, where the run is on a GPU.

    Raises UsageError for a device that this machine, or this build of torch, does not have.
    """
    try:
        device = torch.device(options.device)
    except RuntimeError:
        raise UsageError(f"--device '{options.device}' is no device; cpu, cuda or cuda:0 are") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {options.device} is not supported; cpu and cuda are")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        why = "this build of torch has no CUDA" if torch.version.cuda is None else f"this machine has {found} CUDA devices"
        raise UsageError(f"--device {options.device} cannot be used: {why}; --device cpu can")
    if device.type == "cuda":
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False


def fits_on_device(device: str, bytes: int) -> bool:
    """Whether `device` is a GPU of whose memory `bytes` are at most an eighth: by its size, not by what is free now."""
    return torch.device(device).type == "cuda" and bytes <= torch.cuda.get_device_properties(device).total_memory / 8


def autocast(options: RunOptions) -> AbstractContextManager[Any]:
    """Forward passes of local training in bfloat16 where the run asks for it; weights, gradients and sums stay float32."""
    if options.precision == "float32":
        return nullcontext()
    return torch.autocast(torch.device(options.device).type, torch.bfloat16)
