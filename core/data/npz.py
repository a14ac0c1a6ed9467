"""Data sets in .npz files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetfl.config import DataOptions
from hetfl.data.cache import Stored
from hetfl.data.catalog import DataLocation
from hetfl.data.columns import INPUTS, LABELS, OWNERS, _Columns, _described, _line, _numbered
from hetfl.data.lazy import library
from hetfl.errors import UsageError


def arrays(source: DataLocation, options: DataOptions) -> Stored:
    """The tensors of train.npz and test.npz, as docs/data.md describes them."""
    files = source.files or {}
    train = _loaded(files["train"][0])
    test = next((_loaded(files[split][0]) for split in ("test", "validation") if split in files), None)
    owner = None
    if options.partition == "natural":
        owner = _key(source, train, "--id-column", options.id_column, ((source.known and source.known.owner) or "", *OWNERS))
    columns = _Columns(
        _key(source, train, "--input-column", options.input_column, ("x", *INPUTS)),
        _key(source, train, "--label-column", options.label_column, ("y", *LABELS)),
        owner,
    )
    parts = {"": train} | ({} if test is None else {"test.": test})
    for part in parts.values():
        _aligned(source, part, columns)
    tensors = {f"{name}x": _values(source, columns.input, part) for name, part in parts.items()}
    classes, labels = _numbered(source, columns.label, [_listed(source, columns.label, p[columns.label]) for p in parts.values()])
    tensors |= {f"{name}y": y for name, y in zip(parts, labels, strict=True)}
    if owner:
        tensors["ids"] = _numbered(source, owner, [train[owner].tolist()])[1][0]
    return _described(source, tensors, _named(train, classes), columns, {})


def _loaded(path: Path) -> dict[str, Any]:
    try:
        with library("numpy").load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except Exception as error:
        raise UsageError(f"'{path}' cannot be read as npz: {_line(error)}") from error


def _key(source: DataLocation, part: dict[str, Any], flag: str, asked: str | None, usual: tuple[str, ...]) -> str:
    found = asked if asked in part else None if asked else next((name for name in usual if name in part), None)
    if found is None:
        wanted = f"'{asked}'" if asked else " or ".join(f"'{name}'" for name in usual[:2] if name)
        raise UsageError(f"{source.name} has no array {wanted}: name one with {flag} (arrays: {', '.join(part)})")
    return found


def _aligned(source: DataLocation, part: dict[str, Any], columns: _Columns) -> None:
    sizes = {name: len(part[name]) if part.get(name) is not None and part[name].ndim else 0 for name in columns[:2]}
    if len(set(sizes.values())) > 1 or not all(sizes.values()):
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UsageError(f"the arrays of {source.name} must have one row for each example, but hold {shown}")


def _values(source: DataLocation, name: str, part: dict[str, Any]) -> Tensor:
    array = part[name]
    if array.dtype.kind not in "fiub" or array.ndim < 2:
        raise UsageError(f"array '{name}' of {source.name} holds no inputs: numbers of shape (N, …) are needed")
    x = torch.from_numpy(array if array.dtype == "uint8" else array.astype("float32"))
    if not bool(x.isfinite().all()):
        raise UsageError(f"array '{name}' of {source.name} has values that are not finite")
    return x.unsqueeze(1) if x.dim() == 3 else x


def _listed(source: DataLocation, name: str, array: Any) -> list[Any]:
    if array.dtype.kind not in "iubU" or array.ndim != 1:
        raise UsageError(f"array '{name}' of {source.name} holds no class labels: whole numbers or strings of shape (N,)")
    return list(array.tolist())


def _named(part: dict[str, Any], classes: list[str]) -> list[str]:
    names = [str(name) for name in part.get("classes", [])]
    return names if len(names) == len(classes) else classes
