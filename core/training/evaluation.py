"""Accuracy and loss of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetfl.data.dataset import Examples

Seen = tuple[int, int, float]  # of one batch: examples, right answers, summed loss


@dataclass(frozen=True)
class Score:
    """Accuracy (share) and mean cross entropy on `examples` examples."""

    accuracy: float
    loss: float
    examples: int


def evaluate(model: nn.Module, data: Examples, batch: int, labels: Tensor | None = None) -> Score:
    """Accuracy and loss of `model` on `data`; with `labels`, a bool for each class, the other classes' logits count as 0."""
    return total_score(examine(model, data, data.rows(batch), labels))


def examine(model: nn.Module, data: Examples, batches: Iterable[Tensor], labels: Tensor | None = None) -> list[Seen]:
    """What came of each of `batches`, positions in `data`."""
    model.eval()
    found = []
    with torch.inference_mode():
        for rows in batches:
            logits, y = model(data.x[rows]), data.y[rows]
            if labels is not None:
                logits = logits.masked_fill(~labels.to(logits.device), 0.0)
            loss = float(F.cross_entropy(logits, y, reduction="sum"))
            found.append((len(rows), int((logits.argmax(1) == y).sum()), loss))
    return found


def total_score(batches: Sequence[Seen]) -> Score:
    """The score over the batches that `examine` saw, summed in their order."""
    count = sum(n for n, _, _ in batches)
    right, loss = sum(r for _, r, _ in batches), sum(total for _, _, total in batches)
    return Score(right / max(count, 1), loss / max(count, 1), count)
