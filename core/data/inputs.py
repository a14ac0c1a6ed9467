"""What a model is fed: shape, classes, vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """What a model is to be built for: the shape of one example, the number of classes, and of token ids for text."""

    shape: tuple[int, ...]
    classes: int
    vocab: int | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What factories may ask for, by our names."""
        if self.vocab is not None:
            return {"classes": self.classes, "vocab": self.vocab, "length": self.shape[0]}
        size = self.shape[1] if len(set(self.shape[1:])) == 1 else tuple(self.shape[1:])
        return {"classes": self.classes, "channels": self.shape[0], "size": size}

    def batch(self, count: int = 2) -> Tensor:
        """Random examples of this shape, always the same."""
        generator = torch.Generator().manual_seed(0)
        if self.vocab is not None:
            return torch.randint(2, self.vocab, (count, *self.shape), generator=generator)
        return torch.randn(count, *self.shape, generator=generator)


def default_model(inputs: Inputs) -> str:
    """The model a run takes for a data set of its own where none is named."""
    if inputs.vocab is not None:
        return "encoder"
    if len(inputs.shape) != 3:
        return "mlp"
    return "fedconv-cnn" if inputs.shape[0] == 1 else "resnet18"
