"""What the columns of a data set are: inputs, labels, owners."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetfl.data.cache import Stored
from hetfl.data.catalog import DataLocation
from hetfl.errors import UsageError

Progress = Callable[[str], None]

LABELS = ("label", "labels", "y", "target")

OWNERS = (
    "user",
    "user_id",
    "writer",
    "writer_id",
    "speaker",
    "speaker_id",
    "client",
    "client_id",
    "subject",
    "subject_id",
)

INPUTS = ("features", "data", "image", "images", "inputs")


class Columns(NamedTuple):
    input: str
    label: str
    owner: str | None

    def of(self, split: str) -> list[str]:
        """The columns to read of a split; one column may have two uses."""
        owner = [self.owner] if self.owner and split == "train" else []
        return list(dict.fromkeys([self.input, self.label, *owner]))


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def describe_tensors(
    source: DataLocation, tensors: dict[str, Tensor], classes: list[str], columns: Columns, more: dict[str, Any]
) -> Stored:
    """The tensors with the facts about them."""
    if "test.x" in tensors and tensors["x"].shape[1:] != tensors["test.x"].shape[1:]:
        raise UsageError(
            f"train and test inputs of {source.name} differ in shape: {format_shapes([tensors['x'], tensors['test.x']])}"
        )
    mean, std = ([], []) if more else _channel_moments(tensors["x"])
    content = _content({name: tensor for name, tensor in tensors.items() if name != "ids"}, classes)
    named = {"input_column": columns.input, "label_column": columns.label, "id_column": columns.owner}
    found = {name: value for name, value in named.items() if value is not None}
    return tensors, {"classes": classes, "mean": mean, "std": std, "fingerprint": content, "columns": found, **more}


def format_shapes(inputs: list[Tensor]) -> str:
    return " and ".join("x".join(map(str, x.shape[1:])) for x in inputs)


def _content(tensors: dict[str, Tensor], classes: list[str]) -> str:
    digest = hashlib.blake2b(json.dumps(classes).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"/{name} {tensors[name].dtype} {list(tensors[name].shape)}/".encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


def _channel_moments(x: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of (N, C, …), to 6 digits so that every machine has the same."""
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
    try:
        order = sorted({value for part in parts for value in part})
    except TypeError as error:
        raise UsageError(f"column '{column}' of {source.name} has missing or mixed values") from error
    number = {value: i for i, value in enumerate(order)}
    if None in number:
        raise UsageError(f"column '{column}' of {source.name} has missing values")
    return [str(value) for value in order], [torch.tensor([number[value] for value in part]) for part in parts]
