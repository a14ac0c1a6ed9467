"""Task kinds: what targets are, what a model answers to an example, and what its answers are worth (docs/tasks.md).

Data carry their kind (`Examples.kind`): whatever depends on it asks it there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
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
    detail: ClassVar[str] = ""  # one of DETAILS: what is told beside a score and its loss

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

    def grade(self, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is right of each answer, of how much, and what the example counts (N,): the score of many is the sum of the first
        over that of the second."""
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

    def find_detail(self, loss: float) -> float:
        """What is told beside a score and its loss, under the name `detail`."""
        raise NotImplementedError

    def describe(self, outputs: int) -> str:
        """What is to be answered, in words."""
        raise NotImplementedError


class Classify(TaskKind):
    """One class of several: y int64 (N,), answers (N, classes). Cross entropy; accuracy."""

    name, metric, by_class = "classify", "accuracy", True

    losses = staticmethod(partial(F.cross_entropy, reduction="none"))
    loss = staticmethod(partial(F.cross_entropy))
    total_loss = staticmethod(partial(F.cross_entropy, reduction="sum"))

    def grade(self, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ones = self.units(y)
        return (out.argmax(1) == y).float(), ones, ones

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


class LanguageModel(TaskKind):
    """The next token of each: y int64 (N, T), IGNORED where there is none, answers (N, T, vocab). Cross entropy and accuracy over
    the tokens of all examples alike; perplexity."""

    name, metric, head, tokens, detail = "lm", "token accuracy", "CausalLM", True, "perplexity"

    def answer_shape(self, shape: tuple[int, ...], outputs: int) -> tuple[int, ...]:
        return (shape[0], outputs)

    def losses(self, out: Tensor, y: Tensor) -> Tensor:
        each = F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction="none", ignore_index=IGNORED)
        return each.view(y.shape).sum(1) / self.units(y).clamp(min=1)

    def units(self, y: Tensor) -> Tensor:
        return (y != IGNORED).sum(-1).float()

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        return self.total_loss(out, y) / self.units(y).sum().clamp(min=1)

    def weigh(self, weights: Tensor, y: Tensor) -> Tensor:
        counts = weights * self.units(y)
        return counts / counts.sum(1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)

    def grade(self, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        counts = self.units(y)
        return ((out.argmax(-1) == y) & (y != IGNORED)).sum(1).float(), counts, counts

    def divergence(self, out: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """KL at every position, predicted or not, for answers do not say which are."""
        return kl_divergence(out.flatten(0, 1), teacher.flatten(0, 1), temperature)

    def make_targets(self, shape: tuple[int, ...], outputs: int, count: int) -> Tensor:
        return (torch.arange(count * shape[0]) % outputs).view(count, shape[0])

    def read_targets(self, where: str, x: Tensor, y: Tensor | None) -> Tensor:
        if x.dim() != 2 or x.is_floating_point():
            raise UsageError(f"{where} cannot be of task lm: its inputs are no token ids of shape (N, tokens)")
        if y is None:
            return next_tokens(x, x != 0)
        if y.shape != x.shape or not bool(((y == y.round()) & ((y >= 0) | (y == IGNORED))).all()):
            raise UsageError(
                f"the targets of {where} are no tokens to predict: whole numbers of the inputs' shape {tuple(x.shape)} are needed, "
                f"{IGNORED} where none is to be predicted; or none at all, for the next tokens of the inputs"
            )
        return y.long()

    def blind(self, outputs: int) -> tuple[float | None, float]:
        return 1 / outputs, math.log(outputs)

    def find_detail(self, loss: float) -> float:
        return math.exp(min(loss, 700.0))

    def describe(self, outputs: int) -> str:
        return f"the next of {outputs:,} tokens"


class Numbers(TaskKind):
    """What kinds have in common whose targets are numbers: y float32 (N, outputs), answers of the same shape."""

    def read_targets(self, where: str, x: Tensor, y: Tensor | None) -> Tensor:
        if y is None or y.dim() not in (1, 2) or not bool(y.isfinite().all()):
            raise UsageError(f"the targets of {where} must be finite numbers of shape (N,) or (N, outputs) for task {self.name}")
        return y.float().view(len(y), -1)

    def make_targets(self, shape: tuple[int, ...], outputs: int, count: int) -> Tensor:
        return (torch.arange(count * outputs) % 2).float().view(count, outputs)


class Regress(Numbers):
    """Numbers, normalised by the mean and deviation of those that are trained on. Mean squared error; R2, the share of their
    variance that is explained: 1 minus the loss. RMSE is in standard deviations."""

    name, metric, least, detail = "regress", "R2", -math.inf, "RMSE"

    def losses(self, out: Tensor, y: Tensor) -> Tensor:
        return (out - y).square().mean(1)

    def grade(self, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ones = self.units(y)
        return 1 - self.losses(out, y), ones, ones

    def divergence(self, out: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """The mean squared difference, whatever the temperature."""
        return self.loss(out, teacher)

    def find_scale(self, y: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
        means, stds = y.double().mean(0).tolist(), y.double().std(0, correction=0).tolist()
        std = [float(f"{s:.6g}") if s > 1e-7 * abs(m) else 1.0 for m, s in zip(means, stds, strict=True)]  # float32 knows no less
        return tuple(round(m, 6 - math.floor(math.log10(s))) for m, s in zip(means, std, strict=True)), tuple(std)

    def group(self, y: Tensor, names: Sequence[str]) -> tuple[list[str], Tensor]:
        """Tenths by the first target."""
        first = y[:, 0].double().contiguous()
        bounds = first.quantile(torch.arange(1, TENTHS, dtype=torch.float64) / TENTHS) if len(first) else first
        return [f"tenth {i + 1}" for i in range(TENTHS)], torch.bucketize(first, bounds)

    def blind(self, outputs: int) -> tuple[float | None, float]:
        return 0.0, 1.0

    def spread(self, score: float, examples: int) -> float | None:
        return None

    def find_detail(self, loss: float) -> float:
        return math.sqrt(loss)

    def describe(self, outputs: int) -> str:
        return f"{outputs} number{'s' if outputs > 1 else ''} to predict"


class MultiLabel(Numbers):
    """Any of several labels: y 0 or 1. Binary cross entropy, the mean over labels; F1 over the labels of all examples together,
    which counts those that are right twice, of those that are set and those that were answered."""

    name, metric = "multilabel", "micro F1"

    def losses(self, out: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(out, y, reduction="none").mean(1)

    def grade(self, out: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        answered = (out > 0).float()
        return 2 * (answered * y).sum(1), answered.sum(1) + y.sum(1), self.units(y)

    def divergence(self, out: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
        """KL of each label's two answers at temperature T, the mean over labels."""
        goal = (teacher / temperature).sigmoid()
        cross, own = (F.binary_cross_entropy_with_logits(z / temperature, goal, reduction="none") for z in (out, teacher))
        return (cross - own).mean()

    def read_targets(self, where: str, x: Tensor, y: Tensor | None) -> Tensor:
        if y is None or y.dim() != 2 or not bool(((y == 0) | (y == 1)).all()):
            raise UsageError(f"the targets of {where} must be 0 or 1 for each label, shape (N, labels), for task multilabel")
        return y.float()

    def group(self, y: Tensor, names: Sequence[str]) -> tuple[list[str], Tensor]:
        """The first label that is set."""
        labels = y.shape[1]
        found = [*(names or map(str, range(labels))), "none"]
        return found, torch.where(y.any(1), y.argmax(1), labels)

    def blind(self, outputs: int) -> tuple[float | None, float]:
        return None, math.log(2)

    def spread(self, score: float, examples: int) -> float | None:
        return None

    def describe(self, outputs: int) -> str:
        return f"{outputs} labels"


def next_tokens(x: Tensor, real: Tensor, prompts: Tensor | None = None) -> Tensor:
    """The targets (N, T) of token ids x: the token after each, where that is `real` and not among an example's first `prompts`."""
    after = torch.full_like(x, IGNORED, dtype=torch.int64)
    after[:, :-1] = torch.where(real[:, 1:], x[:, 1:].long(), IGNORED)
    if prompts is not None:
        after[torch.arange(x.shape[1]) + 1 < prompts[:, None]] = IGNORED
    return after


def kl_divergence(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(softmax(teacher / T) || softmax(logits / T)) of logits and teacher (N, classes), the mean over the batch."""
    own, goal = (logits / temperature).log_softmax(1), (teacher / temperature).log_softmax(1)
    return (goal.exp() * (goal - own)).sum() / len(own)


CLASSIFY = Classify()

KINDS: dict[str, TaskKind] = {kind.name: kind for kind in (CLASSIFY, LanguageModel(), Regress(), MultiLabel())}


def find_kind(name: str) -> TaskKind:
    """The kind of that name. Raises UsageError."""
    if name not in KINDS:
        raise UsageError(f"no task kind '{name}' (known: {', '.join(KINDS)})")
    return KINDS[name]
