"""Data sets that a program hands over in memory: tensors, arrays, torch's Datasets, and those of Hugging Face's datasets."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from hetfl.config import DataOptions
from hetfl.data import arrow, catalog
from hetfl.data.cache import Stored
from hetfl.data.catalog import GIVEN, DataLocation
from hetfl.data.columns import channel_moments, number_values
from hetfl.data.kinds import find_kind
from hetfl.data.lazy import import_library
from hetfl.data.targets import describe_targets, guess_kind
from hetfl.digest import digest_json, digest_tensors
from hetfl.errors import UsageError, unknown

SPLITS = ("train", "test", "validation")

FORMS = 'a torch Dataset, a pair (x, y), a datasets.Dataset, or {"train": …, "test": …} of these'


class Split(NamedTuple):
    """Inputs x (N, …) before normalisation, labels as they stand or targets (N, …), and the classes' names where they are known."""

    x: Tensor
    labels: list[Any] | Tensor
    classes: list[str] | None


def add_local(data: Any) -> str:
    """A name by which `catalog.find_dataset` gives these data in this process, until `remove_local`: equal data have equal names.

    Raises UsageError for what is no data set, and for examples that cannot be stacked.
    """
    parts = dict(data) if isinstance(data, Mapping) else {"train": data}
    names = parts.pop("classes", None)
    for split in parts:
        if split not in SPLITS:
            raise unknown("split", str(split), [*SPLITS, "classes"])
    if "train" not in parts:
        raise UsageError(f"data need a train split: give {FORMS}")
    kind = type(data).__name__
    if any(hasattr(part, "select_columns") for part in parts.values()):
        return _add(kind, _tables(parts))
    splits = {split: _split(split, part) for split, part in parts.items()}
    names = None if names is None else [str(name) for name in names]
    return _add(kind, _describe_splits(kind, splits, names, None), partial(_describe_splits, kind, splits, names))


def remove_local(name: str) -> None:
    """Forgets what `add_local` named."""
    catalog.LOCAL.pop(name, None)


def _add(kind: str, found: Stored | dict[str, Any], again: Callable[[str], Stored] | None = None) -> str:
    """Enters decoded tensors, which `again` makes for another task, or the splits of a datasets.DatasetDict, into the catalog."""
    if isinstance(found, dict):
        content = hashlib.sha256("/".join(f"{split}:{part._fingerprint}" for split, part in found.items()).encode()).hexdigest()
        name = f"{GIVEN}{kind}-{content[:8]}"
        where = DataLocation(name, content, splits=found)
        where = DataLocation(
            name, content, splits=found, decode=lambda options, progress: arrow.decode_arrow(where, options, progress)
        )
    else:
        name = f"{GIVEN}{kind}-{found[1]['fingerprint'][:8]}"
        where = DataLocation(
            name, found[1]["fingerprint"], decode=lambda options, progress: _check_options(name, found, options, again)
        )
    return catalog.LOCAL.setdefault(name, where).name


def _tables(parts: dict[str, Any]) -> dict[str, Any]:
    """Splits of the datasets library, which are decoded by columns as those of files are."""
    for split, part in parts.items():
        if not hasattr(part, "select_columns") or not hasattr(part, "__len__"):
            raise UsageError(
                f"the {split} split is a {type(part).__name__}: where one split is a datasets.Dataset all are, and none is streamed"
            )
    return parts


def _check_options(name: str, found: Stored, options: DataOptions, again: Callable[[str], Stored] | None) -> Stored:
    """Tensors need no columns, and have none that says whose an example is; they are what --task says, where that is given."""
    if options.partition == "natural":
        raise UsageError(
            f"the data '{name}' do not say whose each example is, as --partition natural needs: "
            "give a datasets.Dataset with an --id-column"
        )
    return again(options.task) if options.task not in (None, found[1]["task"]) and again else found


def _split(split: str, part: Any) -> Split:
    """One split as tensors. Raises UsageError where it is in no form that is known."""
    names = getattr(part, "classes", None)
    classes = [str(name) for name in names] if isinstance(names, Sequence) and not isinstance(names, str) else None
    if isinstance(part, TensorDataset):
        part = part.tensors
    elif isinstance(part, IterableDataset) or not (isinstance(part, tuple) or _is_map_style(part)):
        raise UsageError(f"the {split} data are a {type(part).__name__}: give {FORMS}, with a length")
    if not isinstance(part, tuple):
        part = _stack_examples(split, part)
    if len(part) != 2:
        raise UsageError(f"the {split} data are {len(part)} parts: a pair (x, y) of inputs and labels, or targets, is needed")
    x, labels = _inputs(split, part[0]), _labels(split, part[1])
    if len(x) != len(labels) or not len(x):
        raise UsageError(f"the {split} data have {len(x)} inputs and {len(labels)} labels: one label for each input is needed")
    return Split(x, labels, classes)


def _is_map_style(part: Any) -> bool:
    sized = hasattr(part, "__getitem__") and hasattr(part, "__len__") and not hasattr(part, "shape")
    return sized and not isinstance(part, Mapping | str)


def _stack_examples(split: str, dataset: Any) -> tuple[Any, Any]:
    """The examples of a map-style Dataset, each taken once, as inputs (N, …) and labels (N,)."""
    xs, ys = [], []
    for i in range(len(dataset)):
        example = dataset[i]
        if not isinstance(example, tuple | list) or len(example) != 2:
            raise UsageError(f"example {i} of the {split} data is no pair (x, y) but a {type(example).__name__}")
        xs.append(_tensor(split, _pixels(example[0])))
        ys.append(example[1].item() if hasattr(example[1], "item") and getattr(example[1], "ndim", 1) == 0 else example[1])
    shapes = sorted({tuple(x.shape) for x in xs})
    if len(shapes) != 1:
        shown = f"have different shapes ({shapes[0]} and {shapes[-1]}): resize or pad them first" if shapes else "are none"
        raise UsageError(f"the examples of the {split} data {shown}")
    return torch.stack(xs), ys


def _pixels(x: Any) -> Any:
    """A picture of Pillow's as uint8 (C, H, W); anything else as it is."""
    if not hasattr(x, "getbands"):
        return x
    array = import_library("numpy").asarray(x.convert("L" if x.mode in ("1", "L", "LA") else "RGB"))
    return torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def _inputs(split: str, x: Any) -> Tensor:
    """Numbers (N, …) as uint8 or float32, or token ids (N, length) as int64: torch tensors of whole numbers are ids."""
    ids = isinstance(x, Tensor) and x.dim() == 2 and x.dtype in (torch.int16, torch.int32, torch.int64)
    tensor = _tensor(split, x)
    if tensor.dim() < 2:
        raise UsageError(f"the {split} inputs have the shape {tuple(tensor.shape)}: (N, …) is needed, an example a row")
    if ids:
        if len(tensor) and int(tensor.min()) < 0:
            raise UsageError(f"the {split} inputs are token ids, but some are negative")
        return tensor.to(torch.int64).contiguous()
    tensor = tensor if tensor.dtype == torch.uint8 else tensor.to(torch.float32)
    if not bool(tensor.isfinite().all()):
        raise UsageError(f"the {split} inputs have values that are not finite")
    return tensor.contiguous()


def _tensor(split: str, x: Any, what: str = "inputs") -> Tensor:
    try:
        tensor = x if isinstance(x, Tensor) else torch.from_numpy(import_library("numpy").array(x))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"the {split} {what} are no numbers of one shape: {' '.join(str(error).split())[:120]}") from error
    if tensor.is_complex():
        raise UsageError(f"the {split} inputs are complex numbers; give their parts as channels")
    return tensor.detach().cpu()


def _labels(split: str, y: Any) -> list[Any] | Tensor:
    """Class numbers or names, one for each example; or, where they are none, numbers (N, …)."""
    if isinstance(y, list) and y and (isinstance(y[0], float) or hasattr(y[0], "ndim")):
        y = torch.stack([torch.as_tensor(each) for each in y])
    if getattr(y, "ndim", 1) > 1 or str(getattr(y, "dtype", "")).replace("torch.", "").startswith(("float", "bfloat")):
        return _tensor(split, y, "targets")
    values = y.tolist() if hasattr(y, "tolist") else list(y)
    if not all(isinstance(value, int | str) for value in values):
        raise UsageError(f"the {split} labels must be whole numbers or names of classes, one for each example: shape (N,)")
    return values


def _describe_splits(kind: str, splits: Mapping[str, Split], names: list[str] | None, task: str | None) -> Stored:
    """The tensors of the splits and the facts about them, as those of a data set from files; `task` is guessed where it is None."""
    test = next((splits[split] for split in ("test", "validation") if split in splits), None)
    parts = {"": splits["train"]} | ({} if test is None else {"test.": test})
    if len(shapes := {tuple(part.x.shape[1:]): split for split, part in splits.items()}) > 1:
        raise UsageError(f"the splits' inputs differ in shape: {' and '.join(map(str, shapes))}")
    tensors = {f"{prefix}x": part.x for prefix, part in parts.items()}
    found, known = _describe_labels(kind, parts, names or splits["train"].classes, task)
    tensors, classes = tensors | found, known["classes"]
    facts: dict[str, Any] = known | {
        "mean": [],
        "std": [],
        "columns": {},
        "fingerprint": digest_json([classes, digest_tensors(tensors)]),
    }
    if splits["train"].x.dtype == torch.int64:
        return tensors, {"vocab": max(3, *(int(part.x.max()) + 1 for part in parts.values()))} | facts
    mean, std = channel_moments(splits["train"].x)
    return tensors, facts | {"mean": mean, "std": std}


def _describe_labels(kind: str, parts: Mapping[str, Split], names: list[str] | None, task: str | None) -> Stored:
    """The targets y, test.y as those of their kind of task, and the facts about them."""
    first = parts[""]
    goal = find_kind(task or ("classify" if isinstance(first.labels, list) else guess_kind(first.x, first.labels)))
    listed = [list(part.labels) for part in parts.values() if isinstance(part.labels, list)]
    if goal.tokens and listed:  # sentences with classes, which are no targets
        classes, groups = _numbers(kind, listed, names)
        return describe_targets(goal, f"the {kind}", {p: (part.x, None) for p, part in parts.items()}, (), (classes, groups[0]))
    if not goal.by_class:
        numbers = {prefix: (part.x, _as_numbers(part.labels, goal.name)) for prefix, part in parts.items()}
        return describe_targets(goal, f"the {kind}", numbers, names or ())
    if len(listed) < len(parts):
        raise UsageError(f"the {kind} has no class labels: whole numbers or names of shape (N,), as task {goal.name} needs")
    classes, labels = _numbers(kind, listed, names)
    return {f"{prefix}y": y for prefix, y in zip(parts, labels, strict=True)}, {"classes": classes, "task": goal.name}


def _as_numbers(labels: list[Any] | Tensor, task: str) -> Tensor:
    """Targets (N, …), of whole numbers too. Raises UsageError for names."""
    if isinstance(labels, list) and not all(isinstance(label, int) for label in labels):
        raise UsageError(f"labels that are names cannot be learned as task {task}: numbers are needed")
    return torch.tensor(labels) if isinstance(labels, list) else labels


def _numbers(kind: str, labels: list[list[Any]], names: list[str] | None) -> tuple[list[str], list[Tensor]]:
    """Names of the classes and int64 labels (N,); where names are known, labels are positions among them, or names."""
    if names and all(isinstance(value, int) and 0 <= value < len(names) for part in labels for value in part):
        return names, [torch.tensor(part, dtype=torch.int64) for part in labels]
    if names and all(value in names for part in labels for value in part):
        return names, [torch.tensor([names.index(value) for value in part], dtype=torch.int64) for part in labels]
    return number_values(DataLocation(kind, None), "label", labels)
