"""Data sets in .npz files."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetfl.config import DataOptions
from hetfl.data.cache import Stored
from hetfl.data.catalog import DataLocation
from hetfl.data.columns import INPUTS, LABELS, OWNERS, Columns, describe_tensors, first_line, number_values
from hetfl.data.kinds import find_kind
from hetfl.data.lazy import import_library
from hetfl.data.targets import describe_targets
from hetfl.errors import UsageError


def decode_npz(source: DataLocation, options: DataOptions) -> Stored:
    """The tensors x, y, test.x, test.y and ids of train.npz and test.npz, with facts, as docs/data.md describes the files."""
    files = source.files or {}
    train = _load_arrays(files["train"][0])
    test = next((_load_arrays(files[split][0]) for split in ("test", "validation") if split in files), None)
    columns = _choose_arrays(source, options, train)
    parts = {"": train} | ({} if test is None else {"test.": test})
    for part in parts.values():
        _check_lengths(source, part, columns)
    kind = find_kind(options.task or _guess_kind(train[columns.input], train.get(columns.label or "")))
    tensors = {f"{name}x": _decode_inputs(source, columns.input, part, kind.tokens) for name, part in parts.items()}
    names, label, facts = [str(name) for name in train.get("classes", [])], columns.label or "", dict[str, Any]()
    named = label in train and (kind.by_class or (kind.tokens and train[label].ndim == 1))  # else numbers, or nothing
    listed = [_list_labels(source, label, part[label]) for part in parts.values()] if named else []
    classes, labels = number_values(source, label, listed) if named else ([], [])
    classes = names if len(names) == len(classes) else classes
    if kind.by_class:
        tensors |= {f"{name}y": y for name, y in zip(parts, labels, strict=True)}
    else:
        numbers = {n: (tensors[f"{n}x"], None if named else _decode_targets(source, label, part)) for n, part in parts.items()}
        found, facts = describe_targets(kind, source.name, numbers, names, (classes, labels[0]) if named else None)
        tensors, classes = tensors | found, facts["classes"]
    if columns.owner:
        tensors["ids"] = number_values(source, columns.owner, [train[columns.owner].tolist()])[1][0]
    return describe_tensors(source, tensors, classes, columns, facts)


def _guess_kind(x: Any, y: Any) -> str:
    """The name of the kind of task of arrays that no option says it of."""
    if y is None:
        return "classify"
    same = y.ndim > 1 and y.shape == x.shape and {x.dtype.kind, y.dtype.kind} <= set("iu")
    return "lm" if same else "regress" if y.dtype.kind == "f" else "multilabel" if y.ndim > 1 else "classify"


def _decode_targets(source: DataLocation, name: str, part: dict[str, Any]) -> Tensor | None:
    """Numbers (N, …) of an array, None where there is none to read. Raises UsageError."""
    if not name:
        return None
    array = part[name]
    if array.dtype.kind not in "fiub":
        raise UsageError(f"array '{name}' of {source.name} holds no numbers (its type is {array.dtype})")
    return torch.from_numpy(array.astype("float32" if array.dtype.kind == "f" else "int64"))


def _load_arrays(path: Path) -> dict[str, Any]:
    """The arrays of a file by name. Raises UsageError where it cannot be read, or holds pickles."""
    if not zipfile.is_zipfile(path):
        raise UsageError(f"'{path}' is no npz file: numpy.savez(path, x=…, y=…) writes one")
    try:
        with import_library("numpy").load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:
        raise UsageError(f"'{path}' cannot be read as npz: {first_line(error)}") from error


def _choose_arrays(source: DataLocation, options: DataOptions, train: dict[str, Any]) -> Columns:
    """The arrays that the options name, else those of a usual name. Raises UsageError where there is none."""
    owner = (source.known and source.known.owner) or ""
    natural = options.partition == "natural"
    return Columns(
        _choose_array(source, train, "--input-column", options.input_column, ("x", *INPUTS)),
        _choose_label(source, options, train),
        _choose_array(source, train, "--id-column", options.id_column, (owner, *OWNERS)) if natural else None,
    )


def _choose_label(source: DataLocation, options: DataOptions, train: dict[str, Any]) -> str | None:
    """The array of the targets; None where next tokens are to be learned and there is none. Raises UsageError."""
    usual = ("y", *LABELS)
    if options.task and find_kind(options.task).tokens and not options.label_column and not {*usual} & {*train}:
        return None
    return _choose_array(source, train, "--label-column", options.label_column, usual)


def _choose_array(source: DataLocation, part: dict[str, Any], flag: str, asked: str | None, usual: tuple[str, ...]) -> str:
    """The array `asked`, else the first of the `usual` names that is there. Raises UsageError."""
    found = asked if asked in part else None if asked else next((name for name in usual if name in part), None)
    if found is None:
        wanted = f"'{asked}'" if asked else " or ".join(f"'{name}'" for name in usual[:2] if name)
        raise UsageError(f"{source.name} has no array {wanted}: name one with {flag} (arrays: {', '.join(part)})")
    return found


def _check_lengths(source: DataLocation, part: dict[str, Any], columns: Columns) -> None:
    """Raises UsageError where inputs and labels are not there for each example, or there is none."""
    sizes = {name: len(part[name]) if part.get(name) is not None and part[name].ndim else 0 for name in columns[:2] if name}
    if len(set(sizes.values())) > 1 or not all(sizes.values()):
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UsageError(f"the arrays of {source.name} must have one row for each example, but hold {shown}")


def _decode_inputs(source: DataLocation, name: str, part: dict[str, Any], tokens: bool) -> Tensor:
    """Inputs as uint8 or float32 (N, *shape), where 2-D arrays get one channel, or as `tokens` (N, length). Raises UsageError."""
    array = part[name]
    if tokens and array.dtype.kind in "iu" and array.ndim == 2 and array.min() >= 0:
        return torch.from_numpy(array.astype("int64"))
    if array.dtype.kind not in "fiub" or array.ndim < 2:
        raise UsageError(f"array '{name}' of {source.name} holds no inputs: numbers of shape (N, …) are needed")
    x = torch.from_numpy(array if array.dtype == "uint8" else array.astype("float32"))
    if not bool(x.isfinite().all()):
        raise UsageError(f"array '{name}' of {source.name} has values that are not finite")
    return x.unsqueeze(1) if x.dim() == 3 else x


def _list_labels(source: DataLocation, name: str, array: Any) -> list[Any]:
    """Labels (N,) as a list of whole numbers or strings. Raises UsageError."""
    if array.dtype.kind not in "iubU" or array.ndim != 1:
        raise UsageError(f"array '{name}' of {source.name} holds no class labels: whole numbers or strings of shape (N,)")
    return list(array.tolist())
