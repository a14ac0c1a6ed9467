"""Ops that only move data, run on channel ids in place of values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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
