"""Data sets of Hugging Face's datasets library, decoded into tensors."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetfl.config import DataOptions
from hetfl.data.cache import Stored
from hetfl.data.catalog import DataLocation
from hetfl.data.columns import LABELS, OWNERS, Progress, _Columns, _described, _line, _numbered, _shapes
from hetfl.data.lazy import library, quiet
from hetfl.data.npz import arrays
from hetfl.data.tokens import hashed
from hetfl.errors import UsageError, unknown


def decoded(source: DataLocation, options: DataOptions, progress: Progress) -> Stored:
    """Raw tensors x, y, test.x, test.y (where there is a test or validation split) and ids (natural partition)."""
    progress(f"reading {source.name}" if source.files or source.splits else f"asking the Hub for {source.hub}")
    if source.files and source.files["train"][0].suffix == ".npz":
        return arrays(source, options)
    with quiet():
        features, splits = _opened(source)
        columns = _columns(source, options, features)
        tables = {split: splits[split](columns.of(split)) for split in ("train", "test", "validation") if split in splits}
    if not len(tables["train"]):
        raise UsageError(f"the train split of {source.name} has no rows")
    test = next((tables[split] for split in ("test", "validation") if split in tables and len(tables[split])), None)
    progress(f"decoding {sum(map(len, tables.values())):,} examples of {source.name} (once)")
    return _tensors(source, options, columns, features, tables["train"], test)


def _opened(source: DataLocation) -> tuple[dict[str, Any], dict[str, Callable[[list[str]], Any]]]:
    """The features of a data set, and for each split a way to read columns of it into one Arrow table."""
    datasets = library("datasets")
    if source.files is None:
        splits = _hub(source.hub) if source.splits is None else source.splits
        return splits["train"].features, {name: partial(_read_hub, split) for name, split in splits.items()}
    with _readable(source.files["train"][0]) as file:
        features = datasets.Features.from_arrow_schema(library("pyarrow.parquet").read_schema(file))
    return features, {split: partial(_read_files, files) for split, files in source.files.items()}


def _read_hub(split: Any, columns: list[str]) -> Any:
    return split.select_columns(columns).with_format("arrow")[:]


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[Path]:
    try:
        yield file
    except (OSError, LookupError, TypeError, ValueError, library("pyarrow").ArrowException) as error:
        raise UsageError(f"'{file}' cannot be read as parquet: {_line(error)}") from error


def _read_files(files: list[Path], columns: list[str]) -> Any:
    tables = []
    for path in files:
        with _readable(path) as file:
            parquet = library("pyarrow.parquet").ParquetFile(file)
            if lacking := [column for column in columns if column not in parquet.schema_arrow.names]:
                raise ValueError(f"it has no column '{lacking[0]}'")
            tables.append(parquet.read(columns).select(columns))
    with _readable(files[0].parent):
        return library("pyarrow").concat_tables(tables)


def _hub(name: str) -> dict[str, Any]:
    """The splits of a Hub data set, downloaded or from the cache of `datasets`."""
    hub, datasets = library("huggingface_hub"), library("datasets")
    instead = "; the folder of a local copy can be given instead"
    try:
        revision = None if hub.is_offline_mode() else hub.HfApi().dataset_info(name, timeout=10).sha
        splits: dict[str, Any] = dict(datasets.load_dataset(name, revision=revision))
    except hub.errors.RepositoryNotFoundError as error:
        raise UsageError(f"the Hub has no data set '{name}' that is open to you{instead}") from error
    except Exception as error:  # whatever httpx, the Hub's client or a data set's files can raise
        lost = isinstance(error, OSError | library("httpx").TransportError)
        why = f"there is no such folder here and the Hub could not be reached ({_line(error)})" if lost else _line(error)
        raise UsageError(f"cannot load data set '{name}': {why}{instead}") from error
    if "train" not in splits:
        raise UsageError(f"data set '{name}' has no train split (it has {', '.join(splits)})")
    return splits


def _columns(source: DataLocation, options: DataOptions, features: dict[str, Any]) -> _Columns:
    known = source.known

    def choose(flag: str, asked: str | None, usual: str | None, what: str, found: list[str]) -> str:
        if asked is not None and asked not in features:
            raise UsageError(f"{flag}: {unknown('column', asked, features)}")
        if asked is None and usual in features and usual is not None:
            return str(usual)
        if asked is None and len(found) != 1:
            has = f"several {what} columns ({', '.join(found)})" if found else f"no {what} column"
            raise UsageError(f"{source.name} has {has}: name one with {flag} (columns: {', '.join(features)})")
        return asked or found[0]

    inputs = [name for name, feature in features.items() if _is_image(feature) or _is_numeric(feature)]
    inputs = inputs or [name for name, feature in features.items() if _is_text(feature) and name not in LABELS]
    owners = [name for name in features if name.lower() in OWNERS]
    return _Columns(
        choose("--input-column", options.input_column, known.input if known else None, "image, numeric or text input", inputs),
        choose("--label-column", options.label_column, known.label if known else None, "label", _label_columns(features)),
        choose("--id-column", options.id_column, known.owner if known else None, "owner", owners)
        if options.partition == "natural"
        else None,
    )


def _label_columns(features: dict[str, Any]) -> list[str]:
    classes = [name for name, feature in features.items() if hasattr(feature, "int2str")]
    named = [name for name in features if name.lower() in LABELS]
    whole = [name for name in named if str(getattr(features[name], "dtype", "")).lstrip("u").startswith("int")]
    return [name for name in classes if name in named] or classes or whole


def _is_image(feature: Any) -> bool:
    return isinstance(feature, library("datasets").Image) or (isinstance(feature, dict) and "bytes" in feature)


def _is_text(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")) in ("string", "large_string") and not hasattr(feature, "int2str")


def _is_numeric(feature: Any) -> bool:
    """Whether a feature is a list or array, of any depth, of numbers."""
    if not hasattr(feature, "feature") and not hasattr(feature, "shape"):
        return False
    while hasattr(feature, "feature"):
        feature = feature.feature
    return str(getattr(feature, "dtype", "")).lstrip("u").startswith(("int", "float", "bool"))


def _tensors(
    source: DataLocation, options: DataOptions, columns: _Columns, features: dict[str, Any], train: Any, test: Any
) -> Stored:
    tables = {"": train} | ({} if test is None else {"test.": test})
    classes, labels = _labels(source, columns.label, features[columns.label], list(tables.values()))
    tensors = {f"{part}y": y for part, y in zip(tables, labels, strict=True)}
    text = _is_text(features[columns.input])
    for part, table in tables.items():
        tensors[f"{part}x"] = (
            hashed(_words(source, columns.input, table), options.tokens, options.vocab)
            if text
            else _inputs(source, columns.input, features[columns.input], table[columns.input])
        )
    if columns.owner:
        tensors["ids"] = _numbered(source, columns.owner, [train[columns.owner].to_pylist()])[1][0]
    return _described(source, tensors, classes, columns, {"vocab": options.vocab} if text else {})


def _words(source: DataLocation, column: str, table: Any) -> list[str]:
    texts = table[column].to_pylist()
    if None in texts:
        raise UsageError(f"column '{column}' of {source.name} has missing values")
    return list(texts)


def _labels(source: DataLocation, column: str, feature: Any, tables: list[Any]) -> tuple[list[str], list[Tensor]]:
    """Names of the classes, and int64 labels (N,) of each table; values other than ClassLabels are numbered."""
    values = [table[column].to_pylist() for table in tables]
    if not hasattr(feature, "int2str"):
        if not str(getattr(feature, "dtype", "")).lstrip("u").startswith(("int", "bool", "string", "large_string")):
            raise UsageError(f"column '{column}' of {source.name} holds no class labels (whole numbers or strings)")
        return _numbered(source, column, values)
    names = list(feature.names)
    if any(value is None or not 0 <= value < len(names) for part in values for value in part):
        raise UsageError(f"column '{column}' of {source.name} has examples without a label")
    return names, [torch.tensor(part, dtype=torch.int64) for part in values]


def _inputs(source: DataLocation, column: str, feature: Any, chunks: Any) -> Tensor:
    """Images as uint8 (N, C, H, W); numbers as uint8 or float32 (N, *shape), where 2-D arrays get one channel."""
    where = f"column '{column}' of {source.name}"
    if _is_image(feature):
        cast = getattr(feature, "cast_storage", lambda storage: storage)
        return _images(where, [entry for chunk in chunks.chunks for entry in cast(chunk).to_pylist()])
    if not _is_numeric(feature):
        raise UsageError(f"{where} holds neither images nor arrays of numbers")
    arrays = [_numbers(where, chunk) for chunk in chunks.chunks if len(chunk)]
    if len({array.shape[1:] for array in arrays}) > 1:
        raise UsageError(f"{where} has arrays of different shapes ({_shapes(arrays[:2])})")
    x = torch.cat(arrays)
    if not x.isfinite().all():
        raise UsageError(f"{where} has values that are not finite")
    return x.unsqueeze(1) if x.dim() == 3 else x


def _numbers(where: str, array: Any) -> Tensor:
    compute = library("pyarrow.compute")
    array, shape = getattr(array, "storage", array), [len(array)]
    while hasattr(array, "flatten") and hasattr(array.type, "value_type"):
        lengths = compute.unique(compute.list_value_length(array)).to_pylist()
        if len(lengths) != 1 or not lengths[0]:
            raise UsageError(f"{where} has arrays of different shapes, or empty ones")
        shape.append(lengths[0])
        array = array.flatten()
    if array.null_count:
        raise UsageError(f"{where} has missing values")
    values = torch.from_numpy(array.to_numpy(zero_copy_only=False).copy())
    return (values if values.dtype == torch.uint8 else values.float()).view(shape)


def _images(where: str, entries: list[dict[str, Any]]) -> Tensor:
    numpy, pillow = library("numpy"), library("PIL.Image")
    pixels = [numpy.asarray(_image(pillow, where, entry)) for entry in entries]
    if len({array.ndim for array in pixels}) > 1:  # grey among coloured ones
        pixels = [array if array.ndim == 3 else numpy.stack([array] * 3, axis=-1) for array in pixels]
    if len(sizes := sorted({array.shape for array in pixels})) > 1:
        raise UsageError(f"{where} has images of different sizes ({sizes[0][:2]} and {sizes[-1][:2]}): resize them first")
    x = torch.from_numpy(numpy.stack(pixels))
    return x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()


def _image(pillow: Any, where: str, entry: dict[str, Any]) -> Any:
    """The decoded image of an entry with bytes or a path: mode L if it is grey, else RGB."""
    try:
        with pillow.open(io.BytesIO(entry["bytes"]) if entry["bytes"] else entry["path"]) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode} is not 8 bits a channel")
            return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except (OSError, SyntaxError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{where} has an image that cannot be decoded: {_line(error)}") from error
