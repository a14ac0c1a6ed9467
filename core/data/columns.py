"""What the columns of a data set are (inputs, labels, owners), and what is stored about its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetfl.data.cache import Stored
from hetfl.data.catalog import DataLocation
from hetfl.digest import digest_json, digest_tensors
from hetfl.errors import UsageError

Progress = Callable[[str], None]

LABELS = ("label", "labels", "y", "target")

OWNERS = (
    "user", "user_id", "writer", "writer_id", "speaker", "speaker_id", "client", "client_id", "subject", "subject_id",
)  # fmt: skip

INPUTS = ("features", "data", "image", "images", "inputs")


class Columns(NamedTuple):
    """Names of the columns, or arrays, with the inputs, the labels and (natural partition) the owners of the examples."""

    input: str
    label: str | None  # None: nothing but next tokens is to be learned
    owner: str | None
    prompt: str | None = None  # of texts before the inputs, which are not to be learned

    def to_read(self, split: str) -> list[str]:
        """The columns to read of a split; one column may have two uses."""
        owner = [self.owner] if self.owner and split == "train" else []
        return list(dict.fromkeys([self.input, *(name for name in (self.label, self.prompt) if name), *owner]))


def first_line(error: Exception) -> str:
    """The first line of an error's text without a full stop, or the error's type where it has no text."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def describe_tensors(
    source: DataLocation, tensors: dict[str, Tensor], classes: list[str], columns: Columns, more: dict[str, Any]
) -> Stored:
    """The tensors with the facts about them: names of the classes, mean and std of each channel, columns, fingerprint.

    `more` are further facts; text, whose facts have a `vocab`, has no mean. Raises UsageError where train and test differ in shape.
    """
    if "test.x" in tensors and tensors["x"].shape[1:] != tensors["test.x"].shape[1:]:
        shapes = format_shapes([tensors["x"], tensors["test.x"]])
        raise UsageError(f"train and test inputs of {source.name} differ in shape: {shapes}")
    mean, std = ([], []) if "vocab" in more else channel_moments(tensors["x"])
    content = digest_json([classes, digest_tensors({name: tensors[name] for name in sorted(tensors) if name != "ids"})])
    names = {"input_column": columns.input, "label_column": columns.label, "id_column": columns.owner}
    used = {option: name for option, name in names.items() if name is not None}
    return tensors, {"classes": classes, "mean": mean, "std": std, "fingerprint": content, "columns": used, **more}


def format_shapes(inputs: list[Tensor]) -> str:
    """The shapes of one example of each: "1x28x28 and 3x32x32"."""
    return " and ".join("x".join(map(str, x.shape[1:])) for x in inputs)


def channel_moments(x: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of x (N, C, …), to 6 digits so that every machine has the same."""
    total = torch.zeros(x.shape[1], dtype=torch.float64)
    square = torch.zeros_like(total)
    for part in torch.split(x, 1024):
        values = part.double().transpose(0, 1).flatten(1)
        total += values.sum(1)
        square += (values * values).sum(1)
    mean = total / (x.numel() / x.shape[1])
    std = (square / (x.numel() / x.shape[1]) - mean * mean).clamp(min=0).sqrt()
    return [float(f"{m:.6g}") for m in mean.tolist()], [float(f"{s:.6g}") or 1.0 for s in std.tolist()]


def number_values(source: DataLocation, column: str, parts: list[list[Any]]) -> tuple[list[str], list[Tensor]]:
    """The distinct values of a column in ascending order, as text, and for each of `parts` (splits) their numbers (N,), int64.

    Raises UsageError for values that are missing or cannot be compared.
    """
    try:
        distinct = sorted({value for part in parts for value in part})
    except TypeError as error:
        raise UsageError(f"column '{column}' of {source.name} has missing or mixed values") from error
    number = {value: i for i, value in enumerate(distinct)}
    if None in number:
        raise UsageError(f"column '{column}' of {source.name} has missing values")
    return [str(value) for value in distinct], [torch.tensor([number[value] for value in part]) for part in parts]
