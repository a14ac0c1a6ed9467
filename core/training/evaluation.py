"""Score and loss of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hetfl.data.dataset import Examples


class BatchScore(NamedTuple):
    """Of one batch: the number of examples, what is right of how much, and the sum of the losses over so many units."""

    examples: int
    right: float
    of: float
    loss: float
    units: float


@dataclass(frozen=True)
class Score:
    """What a model's answers to `examples` examples are worth: the score of their kind of task, and the mean loss."""

    accuracy: float
    loss: float
    examples: int


def evaluate(model: nn.Module, data: Examples, batch: int, classes: Tensor | None = None) -> Score:
    """Score (of classes the accuracy) and loss of `model` on `data` in batches of `batch`; both 0 where there is no example.

    With `classes`, bool (classes,), the logits of the classes that are False count as 0 (spec heterofl 2.6).
    """
    return sum_scores(score_batches(model, data, data.rows(batch), classes))


def score_batches(model: nn.Module, data: Examples, batches: Iterable[Tensor], classes: Tensor | None = None) -> list[BatchScore]:
    """The score of each of `batches`, which hold positions (N,) in `data.x` and `data.y`; `classes` as in `evaluate`."""
    model.eval()
    scores, kind = [], data.kind
    with torch.inference_mode():
        for rows in batches:
            out, y = model(data.x[rows]), data.y[rows]
            if classes is not None:
                out = out.masked_fill(~classes.to(out.device), 0.0)
            right, of, units = kind.grade(out, y)
            sums = torch.stack([t.double() for t in (right.sum(), of.sum(), kind.total_loss(out, y), units.sum())])
            scores.append(BatchScore(len(rows), *sums.tolist()))
    return scores


def sum_scores(batches: Sequence[BatchScore]) -> Score:
    """The score over all of `batches`, summed in their order."""
    right, of = sum(b.right for b in batches), sum(b.of for b in batches)
    loss, units = sum(b.loss for b in batches), sum(b.units for b in batches)
    return Score(right / max(of, 1), loss / max(units, 1), sum(b.examples for b in batches))
