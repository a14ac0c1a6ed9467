"""What the modules of a model do in one forward pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def run_watched(model: nn.Module, x: Tensor, hooks: Iterable[RemovableHandle]) -> None:
    """Runs `model` on `x` once, without gradients, and removes the `hooks`; the model is in evaluation mode from then on."""
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        for hook in hooks:
            hook.remove()
