"""From a data set's columns to tensors; runs on a cache miss only."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetfl.core.cache import Stored
from hetfl.core.config import DataOptions
from hetfl.core.errors import UsageError, unknown
from hetfl.core.partition import library, quiet
from hetfl.core.sources import Source
from hetfl.core.text import hashed

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


class _Columns(NamedTuple):
    input: str
    label: str
    owner: str | None

    def of(self, split: str) -> list[str]:
        """The columns to read of a split; one column may have two uses."""
        owner = [self.owner] if self.owner and split == "train" else []
        return list(dict.fromkeys([self.input, self.label, *owner]))


def decoded(source: Source, options: DataOptions, progress: Progress) -> Stored:
    """Raw tensors x, y, test.x, test.y (where there is a test or validation split) and ids (natural partition)."""
    progress(f"reading {source.name}" if source.files else f"asking the Hub for {source.hub}")
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


def _opened(source: Source) -> tuple[dict[str, Any], dict[str, Callable[[list[str]], Any]]]:
    """The features of a data set, and for each split a way to read columns of it into one Arrow table."""
    datasets = library("datasets")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    if source.files is None:
        splits = _hub(source.hub)
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


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


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


def _columns(source: Source, options: DataOptions, features: dict[str, Any]) -> _Columns:
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


def _tensors(source: Source, options: DataOptions, columns: _Columns, features: dict[str, Any], train: Any, test: Any) -> Stored:
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


def _described(source: Source, tensors: dict[str, Tensor], classes: list[str], columns: _Columns, more: dict[str, Any]) -> Stored:
    """The tensors with the facts about them."""
    if "test.x" in tensors and tensors["x"].shape[1:] != tensors["test.x"].shape[1:]:
        raise UsageError(f"train and test inputs of {source.name} differ in shape: {_shapes([tensors['x'], tensors['test.x']])}")
    mean, std = ([], []) if more else _moments(tensors["x"])
    content = _content({name: tensor for name, tensor in tensors.items() if name != "ids"}, classes)
    named = {"input_column": columns.input, "label_column": columns.label, "id_column": columns.owner}
    found = {name: value for name, value in named.items() if value is not None}
    return tensors, {"classes": classes, "mean": mean, "std": std, "fingerprint": content, "columns": found, **more}


def _words(source: Source, column: str, table: Any) -> list[str]:
    texts = table[column].to_pylist()
    if None in texts:
        raise UsageError(f"column '{column}' of {source.name} has missing values")
    return list(texts)


def _shapes(inputs: list[Tensor]) -> str:
    return " and ".join("x".join(map(str, x.shape[1:])) for x in inputs)


def _content(tensors: dict[str, Tensor], classes: list[str]) -> str:
    digest = hashlib.blake2b(json.dumps(classes).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"/{name} {tensors[name].dtype} {list(tensors[name].shape)}/".encode())
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


def _moments(x: Tensor) -> tuple[list[float], list[float]]:
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


def _labels(source: Source, column: str, feature: Any, tables: list[Any]) -> tuple[list[str], list[Tensor]]:
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


def _numbered(source: Source, column: str, parts: list[list[Any]]) -> tuple[list[str], list[Tensor]]:
    try:
        order = sorted({value for part in parts for value in part})
    except TypeError as error:
        raise UsageError(f"column '{column}' of {source.name} has missing or mixed values") from error
    number = {value: i for i, value in enumerate(order)}
    if None in number:
        raise UsageError(f"column '{column}' of {source.name} has missing values")
    return [str(value) for value in order], [torch.tensor([number[value] for value in part]) for part in parts]


def _inputs(source: Source, column: str, feature: Any, chunks: Any) -> Tensor:
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


# npz files: arrays x (N, …), y (N,) and, for a natural partition, user (N,); `classes` may name the labels.


def arrays(source: Source, options: DataOptions) -> Stored:
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


def _key(source: Source, part: dict[str, Any], flag: str, asked: str | None, usual: tuple[str, ...]) -> str:
    found = asked if asked in part else None if asked else next((name for name in usual if name in part), None)
    if found is None:
        wanted = f"'{asked}'" if asked else " or ".join(f"'{name}'" for name in usual[:2] if name)
        raise UsageError(f"{source.name} has no array {wanted}: name one with {flag} (arrays: {', '.join(part)})")
    return found


def _aligned(source: Source, part: dict[str, Any], columns: _Columns) -> None:
    sizes = {name: len(part[name]) if part.get(name) is not None and part[name].ndim else 0 for name in columns[:2]}
    if len(set(sizes.values())) > 1 or not all(sizes.values()):
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise UsageError(f"the arrays of {source.name} must have one row for each example, but hold {shown}")


def _values(source: Source, name: str, part: dict[str, Any]) -> Tensor:
    array = part[name]
    if array.dtype.kind not in "fiub" or array.ndim < 2:
        raise UsageError(f"array '{name}' of {source.name} holds no inputs: numbers of shape (N, …) are needed")
    x = torch.from_numpy(array if array.dtype == "uint8" else array.astype("float32"))
    if not bool(x.isfinite().all()):
        raise UsageError(f"array '{name}' of {source.name} has values that are not finite")
    return x.unsqueeze(1) if x.dim() == 3 else x


def _listed(source: Source, name: str, array: Any) -> list[Any]:
    if array.dtype.kind not in "iubU" or array.ndim != 1:
        raise UsageError(f"array '{name}' of {source.name} holds no class labels: whole numbers or strings of shape (N,)")
    return list(array.tolist())


def _named(part: dict[str, Any], classes: list[str]) -> list[str]:
    names = [str(name) for name in part.get("classes", [])]
    return names if len(names) == len(classes) else classes
