"""SHA-256 of settings and of tensors: equal digests, equal content. Torch-free, as listing plugins and presets must be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def digest_json(value: Any) -> str:
    """Of what JSON can say, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_tensors(tensors: Mapping[str, Tensor], shapes: bool = True) -> str:
    """Of tensors on CPU, in their order: names, types, shapes and values.

    Without `shapes` of names and values alone: the "weights sha256" of runs, which must stay comparable with those of older runs.
    """
    import torch

    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update((f"/{name} {tensor.dtype} {list(tensor.shape)}/" if shapes else name).encode())
        found.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
