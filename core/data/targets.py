"""Targets of a data set as its kind of task keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hetfl.data.cache import Stored
from hetfl.data.kinds import TaskKind
from hetfl.errors import UsageError

Numbers = Mapping[str, tuple[Tensor, Tensor | None]]  # by part ("", "test."): inputs x (N, …), and numbers y (N, …) where there are


def guess_kind(x: Tensor, y: Tensor | None) -> str:
    """The name of the kind that targets y (N, …) are of, where nothing says it: by their shape and type alone."""
    if y is not None and y.is_floating_point():
        return "regress"
    if y is None or (y.dim() > 1 and y.shape == x.shape and not x.is_floating_point()):
        return "lm"
    return "multilabel" if y.dim() > 1 else "classify"


def describe_targets(
    kind: TaskKind, where: str, parts: Numbers, names: Sequence[str] = (), labels: tuple[list[str], Tensor] | None = None
) -> Stored:
    """The targets y and test.y of numbers as `kind` keeps them, the groups that a partition skews, and the facts about them.

    `names` are those of the outputs, where they are known; `labels` names and numbers (N,) of the training examples' classes, where
    they have some beside their targets. Raises UsageError for numbers that are none of the kind.
    """
    found = {f"{part}y": kind.read_targets(where, x, y) for part, (x, y) in parts.items()}
    if len(numbers := {y.shape[-1] for y in found.values()}) > 1:
        raise UsageError(
            f"train and test targets of {where} differ in number: {' and '.join(map(str, sorted(numbers)))} an example"
        )
    groups, of = labels or kind.group(found["y"], names)
    facts: dict[str, Any] = {"task": kind.name, "classes": groups}
    if kind.tokens:
        facts["vocab"] = max(3, *(int(t.max()) + 1 for t in (*found.values(), *(x for x, _ in parts.values())) if t.numel()))
    return {**found, "groups": of}, facts | {"outputs": facts.get("vocab", found["y"].shape[-1])}


def group_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """The group of each training example (N,) that a partition skews: its class, where it has one."""
    return tensors.get("groups", tensors["y"])


def scale_targets(y: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(y - mean) / std of each output."""
    return (y - torch.tensor(mean)) / torch.tensor(std)
