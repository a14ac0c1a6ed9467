"""Tables with a column for each feature: their columns of single numbers, joined into one column of vectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from hetfl.config import DataOptions
from hetfl.data.columns import LABELS, OWNERS
from hetfl.data.lazy import import_library
from hetfl.errors import UsageError

JOINED = "features"  # the column of vectors

Readers = Mapping[str, Callable[[list[str]], Any]]  # by split: a function that reads columns into one Arrow table


def list_scalars(options: DataOptions, features: Mapping[str, Any]) -> list[str]:
    """The columns that hold a single number an example and are neither its label nor its owner."""
    others = {options.label_column, options.id_column, *LABELS, *OWNERS}
    return [name for name, feature in features.items() if is_number(feature) and name not in others and name.lower() not in others]


def is_number(feature: Any) -> bool:
    """Whether a feature of `datasets` is a single number."""
    kind = str(getattr(feature, "dtype", "")).lstrip("u")
    return (
        not hasattr(feature, "feature") and not hasattr(feature, "int2str") and kind.startswith(("int", "float", "bool", "double"))
    )


def join_scalars(features: Mapping[str, Any], names: Sequence[str], readers: Readers) -> tuple[dict[str, Any], dict[str, Any]]:
    """`features` and `readers` with the column JOINED, which is read from the columns `names`."""
    datasets = import_library("datasets")
    kind = datasets.Sequence(datasets.Value("float32"), length=len(names))
    return {**features, JOINED: kind}, {split: partial(read_joined, read, tuple(names)) for split, read in readers.items()}


def read_joined(read: Callable[[list[str]], Any], names: Sequence[str], columns: list[str]) -> Any:
    """The columns as one Arrow table; JOINED are the columns `names` beside each other, float32 (N, len(names))."""
    pyarrow, numpy = import_library("pyarrow"), import_library("numpy")
    table = read([*(name for name in columns if name != JOINED), *(names if JOINED in columns else [])])
    if JOINED not in columns:
        return table
    if lacking := [name for name in names if table[name].null_count]:
        raise UsageError(f"column '{lacking[0]}' has missing values")
    x = numpy.stack([table[name].to_numpy().astype("float32") for name in names], axis=1)
    vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(x.reshape(-1)), len(names))
    return table.select([name for name in columns if name != JOINED]).append_column(JOINED, vectors)
