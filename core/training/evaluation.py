"""Accuracy and loss of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetfl.data.dataset import Examples


class BatchScore(NamedTuple):
    """Of one batch: the number of examples, those classified correctly, and the sum of their cross entropies."""

    examples: int
    correct: int
    loss: float


@dataclass(frozen=True)
class Score:
    """Accuracy (share) and mean cross entropy on `examples` examples."""

    accuracy: float
    loss: float
    examples: int


def evaluate(model: nn.Module, data: Examples, batch: int, classes: Tensor | None = None) -> Score:
    """Accuracy and loss of `model` on `data` in batches of `batch`; both 0 where there is no example.

    With `classes`, bool (classes,), the logits of the classes that are False count as 0 (spec heterofl 2.6).
    """
    return sum_scores(score_batches(model, data, data.rows(batch), classes))


def score_batches(model: nn.Module, data: Examples, batches: Iterable[Tensor], classes: Tensor | None = None) -> list[BatchScore]:
    """The score of each of `batches`, which hold positions (N,) in `data.x` and `data.y`; `classes` as in `evaluate`."""
    model.eval()
    scores = []
    with torch.inference_mode():
        for rows in batches:
            logits, y = model(data.x[rows]), data.y[rows]
            if classes is not None:
                logits = logits.masked_fill(~classes.to(logits.device), 0.0)
            loss = float(F.cross_entropy(logits, y, reduction="sum"))
            scores.append(BatchScore(len(rows), int((logits.argmax(1) == y).sum()), loss))
    return scores


def sum_scores(batches: Sequence[BatchScore]) -> Score:
    """The score over all of `batches`, summed in their order."""
    count, correct = sum(b.examples for b in batches), sum(b.correct for b in batches)
    loss = sum(b.loss for b in batches)
    return Score(correct / max(count, 1), loss / max(count, 1), count)
