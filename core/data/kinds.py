"""Task kinds: what targets are, what a model answers to an example, and what its answers are worth (docs/tasks.md).

Data carry their kind (`Examples.kind`): whatever depends on it asks it there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from hetfl.errors import UsageError

IGNORED = -100  # the target of a token that is not to be predicted: padding, a prompt

TENTHS = 10  # groups of examples by the size of their target

DETAILS = ("loss", "p10", "perplexity", "RMSE")  # of a score: further columns "NAME loss" …


class TaskKind:
    """One kind of task. `out` is what a model answers to a batch, `y` are its targets; both have the examples first.

    An example's loss is the mean over its units (one, or the tokens to predict), and it counts as many. The score is a share, at
    most 1 and the higher the better, named `metric`. With `by_class`, an example has one class and an answer a score for each of
    them, so that a client may lack classes. `head`: AutoModelFor… of transformers.
    """

    name: ClassVar[str]
    metric: ClassVar[str]
    head: ClassVar[str] = "SequenceClassification"
    by_class: ClassVar[bool] = False
    least: ClassVar[float] = 0.0  # of a score
    tokens: ClassVar[bool] = False  # whether what is predicted is tokens of the example

    def answer_shape(self, shape: tuple[int, ...], outputs: int) -> tuple[int, ...]:
        """The shape of what a model with so many outputs answers to one example of `shape`."""
        return (outputs,)

    def losses(self, out: Tensor, y: Tensor) -> Tensor:
        """The loss of each example (N,)."""
        raise NotImplementedError

    def units(self, y: Tensor) -> Tensor:
        """What each example counts (N,)."""
        return torch.ones(len(y), device=y.device)

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        """The mean loss of a batch."""
        return self.losses(out, y).mean()

    def total_loss(self, out: Tensor, y: Tensor) -> Tensor:
        """The sum of a batch's losses over all units."""
        return (self.losses(out, y) * self.units(y)).sum()

    def weigh(self, weights: Tensor, y: Tensor) -> Tensor:
        """Weights (clients, N) of examples, which sum to 1 over a client's batch, as those of their losses in its mean."""
        return weights

    def grade(self, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """What is right of each answer, and of how much (N,): the score of many is the sum of the one over that of the other."""
        raise NotImplementedError

    def divergence(self, out: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """How far answers are from a teacher's, the mean over the batch."""
        raise NotImplementedError

    def make_targets(self, shape: tuple[int, ...], outputs: int, count: int) -> Tensor:
        """Some targets of `count` examples of `shape`, to measure what training costs."""
        raise NotImplementedError

    def read_targets(self, where: str, x: Tensor, y: Tensor | None) -> Tensor:
        """The targets of inputs x (N, *shape) as they are kept, from numbers y (N, …). Raises UsageError where `y` are none."""
        raise NotImplementedError

    def find_scale(self, y: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each target by which they are normalised; both empty where they are not."""
        return (), ()

    def group(self, y: Tensor, names: Sequence[str]) -> tuple[list[str], Tensor]:
        """Names of groups of examples, and the group of each (N,), int64: what a partition skews. `names` are those of outputs."""
        return ["all"], torch.zeros(len(y), dtype=torch.int64)

    def blind(self, outputs: int) -> tuple[float | None, float]:
        """The score (None: it depends on the data) and the loss of who has not looked at the input."""
        raise NotImplementedError

    def spread(self, score: float, examples: int) -> float | None:
        """The variance of a score on so many examples; None where it is not known."""
        return score * (1 - score) / examples

    def details(self, loss: float) -> dict[str, float]:
        """What is told beside a score and its loss, by its name among DETAILS."""
        return {}

    def describe(self, outputs: int) -> str:
        """What is to be answered, in words."""
        raise NotImplementedError


class Classify(TaskKind):
    """One class of several: y int64 (N,), answers (N, classes). Cross entropy; accuracy."""

    name, metric, by_class = "classify", "accuracy", True

    def losses(self, out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, reduction="none")

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y)

    def total_loss(self, out: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(out, y, reduction="sum")

    def grade(self, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (out.argmax(1) == y).float(), self.units(y)

    def divergence(self, out: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        return kl_divergence(out, teacher, temperature)

    def make_targets(self, shape: tuple[int, ...], outputs: int, count: int) -> Tensor:
        return torch.arange(count) % outputs

    def group(self, y: Tensor, names: Sequence[str]) -> tuple[list[str], Tensor]:
        return list(names), y

    def blind(self, outputs: int) -> tuple[float | None, float]:
        return 1 / outputs, math.log(outputs)

    def describe(self, outputs: int) -> str:
        return f"{outputs} classes"


def kl_divergence(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher / T) || softmax(logits / T)) of logits and teacher (N, classes), the mean over the batch."""
    own, goal = (logits / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    return (goal.exp() * (goal - own)).sum() / len(own)


CLASSIFY = Classify()

KINDS: dict[str, TaskKind] = {kind.name: kind for kind in (CLASSIFY,)}


def find_kind(name: str) -> TaskKind:
    """The kind of that name. Raises UsageError."""
    if name not in KINDS:
        raise UsageError(f"no task kind '{name}' (known: {', '.join(KINDS)})")
    return KINDS[name]
