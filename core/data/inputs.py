"""What a model is built for: shape of the inputs, what it is to answer, vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hetfl.data.kinds import CLASSIFY, TaskKind


@dataclass(frozen=True)
class Inputs:
    """The shape of one example, the numbers that a model answers with (`classes`, or as many as its kind of task asks for), and for
    text the number of token ids (`vocab`)."""

    shape: tuple[int, ...]
    classes: int
    vocab: int | None = None
    kind: TaskKind = CLASSIFY
    pad: int = 0  # of text: the token that stands where there is none

    @property
    def answer(self) -> tuple[int, ...]:
        """The shape of a model's answer to one example."""
        return self.kind.answer_shape(self.shape, self.classes)

    def targets(self, count: int = 2) -> Tensor:
        """Some targets (count, …)."""
        return self.kind.make_targets(self.shape, self.classes, count)

    @property
    def facts(self) -> dict[str, Any]:
        """The arguments that model factories may have, by hetfl's names for them: classes, channels, size, vocab, length."""
        if self.vocab is not None:
            return {"classes": self.classes, "vocab": self.vocab, "length": self.shape[0], "pad": self.pad}
        size = self.shape[1] if len(self.shape) == 3 and self.shape[1] == self.shape[2] else tuple(self.shape[1:])
        return {"classes": self.classes, "channels": self.shape[0], "size": size}

    def batch(self, count: int = 2) -> Tensor:
        """Random examples (count, *shape), always the same: float32, or int64 token ids."""
        generator = torch.Generator().manual_seed(0)
        if self.vocab is not None:
            return torch.randint(2, self.vocab, (count, *self.shape), generator=generator)
        return torch.randn(count, *self.shape, generator=generator)


def default_model(inputs: Inputs) -> str:
    """The model of a run that names none, on a data set that has none of its own."""
    if inputs.vocab is not None:
        return "decoder" if inputs.kind.tokens else "encoder"
    if len(inputs.shape) != 3:
        return "mlp"
    return "fedconv-cnn" if inputs.shape[0] == 1 else "resnet18"
