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
from hetfl.data.lazy import import_library
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
    tensors = {f"{name}x": _decode_inputs(source, columns.input, part) for name, part in parts.items()}
    listed = [_list_labels(source, columns.label, part[columns.label]) for part in parts.values()]
    classes, labels = number_values(source, columns.label, listed)
    tensors |= {f"{name}y": y for name, y in zip(parts, labels, strict=True)}
    if columns.owner:
        tensors["ids"] = number_values(source, columns.owner, [train[columns.owner].tolist()])[1][0]
    names = [str(name) for name in train.get("classes", [])]
    return describe_tensors(source, tensors, names if len(names) == len(classes) else classes, columns, {})


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
        _choose_array(source, train, "--label-column", options.label_column, ("y", *LABELS)),
        _choose_array(source, train, "--id-column", options.id_column, (owner, *OWNERS)) if natural else None,
    )


def _choose_array(source: DataLocation, part: dict[str, Any], flag: str, asked: str | None, usual: tuple[str, ...]) -> str:
    """The array `asked`, else the first of the `usual` names that is there. Raises UsageError."""
    found = asked if asked in part else None if asked else next((name for name in usual if name in part), None)
    if found is None:
        wanted = f"'{asked}'" if asked else " or ".join(f"'{name}'" for name in usual[:2] if name)
        raise UsageError(f"{source.name} has no array {wanted}: name one with {flag} (arrays: {', '.join(part)})")
    return found


def _check_lengths(source: DataLocation, part: dict[str, Any], columns: Columns) -> None:
    """Raises UsageError where inputs and labels are not there for each example, or there is none."""
    sizes = {name: len(part[name]) if part.get(name) is not None and part[name].ndim else 0 for name in columns[:2]}
    if len(set(sizes.values())) > 1 or not all(sizes.values()):
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UsageError(f"the arrays of {source.name} must have one row for each example, but hold {shown}")


def _decode_inputs(source: DataLocation, name: str, part: dict[str, Any]) -> Tensor:
    """Inputs as uint8 or float32 (N, *shape), where 2-D arrays get one channel. Raises UsageError."""
    array = part[name]
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
