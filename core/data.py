"""Data sets in memory and the federation dealt from them; decoded once, then read back from the cache."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hetfl.core.config import DataOptions
from hetfl.core.errors import UsageError, nearest, unknown
from hetfl.core.partition import Deal, deal, library, quiet

Progress = Callable[[str], None]
Stored = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and JSON-able facts


@dataclass(frozen=True, eq=False)
class Examples:
    """Some rows of a resident tensor: batches are taken by index, so all clients share one copy."""

    x: Tensor  # float32 (N, *shape), normalised
    y: Tensor  # int64 (N,)
    index: Tensor  # int64, the rows that are ours, ascending

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches x (size, *shape), y (size,), each example once, shuffled by `generator`; the last may be short."""
        index = self.index if generator is None else self.index[torch.randperm(len(self), generator=generator)]
        for start in range(0, len(index), size):
            rows = index[start : start + size]
            yield self.x[rows], self.y[rows]

    def all(self) -> tuple[Tensor, Tensor]:
        """Every example: x (len, *shape), y (len,)."""
        return self.x[self.index], self.y[self.index]


@dataclass(frozen=True, eq=False)
class Holding:
    """What one client has; `train` and its own `test` never overlap, `test` may be empty."""

    train: Examples
    test: Examples
    counts: Tensor  # int64 (classes,) of train

    @property
    def labels(self) -> Tensor:
        """Bool (classes,): the classes present in `train`."""
        return self.counts > 0


@dataclass(frozen=True, eq=False)
class Public:
    """The server's labelled data: `tune` to train on, `holdout` only to choose steps."""

    tune: Examples
    holdout: Examples


@dataclass(frozen=True, eq=False)
class Federation:
    """Who holds which examples of a data set. No example is in two of the clients' parts, `public` and `test`."""

    dataset: str
    classes: tuple[str, ...]
    shape: tuple[int, ...]  # of one input
    clients: tuple[Holding, ...]
    public: Public | None
    test: Examples
    fingerprint: str  # equal iff the same people hold the same examples
    counts: Tensor  # int64 (clients, classes) of the clients' train examples


class Known(NamedTuple):
    """A data set that has a short name; pixels are divided by `scale`, then normalised by `mean` and `std`."""

    hub: str
    input: str
    label: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0


KNOWN = {
    "digits": Known("", "image", "label", (0.3054,), (0.3761,), 16.0),
    "mnist": Known("ylecun/mnist", "image", "label", (0.1307,), (0.3081,)),
    "fashion-mnist": Known("zalando-datasets/fashion_mnist", "image", "label", (0.2860,), (0.3530,)),
    "cifar10": Known("uoft-cs/cifar10", "img", "label", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": Known("uoft-cs/cifar100", "img", "fine_label", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
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


def silent(message: str) -> None:
    """Report nothing."""


def load(options: DataOptions, progress: Progress = silent) -> Federation:
    """The federation that `options` describe; the same options give the same bits, from the cache or not.

    `progress` hears of what takes long. Raises UsageError, one sentence, where data cannot be had or dealt as asked.
    """
    source = find(options.dataset)
    natural = options.partition == "natural"
    columns = [options.input_column, options.label_column, options.id_column if natural else None, natural]
    key = [source.identity, columns]
    tensors, facts = _cached("data", key, partial(_decoded, source, options, progress))
    dealt = options.model_dump(include=set(DataOptions.model_fields) - {"dataset", "input_column", "label_column"})
    rows, _ = _cached("deal", [key, facts["fingerprint"], dealt], partial(_dealt, options, tensors, progress))
    clients = range(sum(name.startswith("train.") for name in rows))
    train, own = (tuple(rows[f"{part}.{i}"] for i in clients) for part in ("train", "own"))
    return _federation(source, tensors, facts, Deal(train, own, rows["tune"], rows["holdout"], rows["test"]))


def _dealt(options: DataOptions, tensors: dict[str, Tensor], progress: Progress) -> Stored:
    progress(f"dealing out {len(tensors['y']):,} examples ({options.partition})")
    dealt = deal(options, tensors["y"], tensors.get("test.y"), tensors.get("ids"))
    numbered = {f"{part}.{i}": rows for part in ("train", "own") for i, rows in enumerate(getattr(dealt, part))}
    return {"tune": dealt.tune, "holdout": dealt.holdout, "test": dealt.test, **numbered}, {}


def _federation(source: Source, tensors: dict[str, Tensor], facts: dict[str, Any], dealt: Deal) -> Federation:
    apart = "test.y" in tensors
    used = [*dealt.train, *dealt.own, dealt.tune, dealt.holdout, *([] if apart else [dealt.test])]
    pick = _resident(tensors["x"], tensors["y"], used, source.known, facts)
    pick_test = _resident(tensors["test.x"], tensors["test.y"], [dealt.test], source.known, facts) if apart else pick
    classes = len(facts["classes"])
    counts = torch.stack([tensors["y"][rows].bincount(minlength=classes) for rows in dealt.train])
    clients = [Holding(pick(train), pick(own), count) for train, own, count in zip(dealt.train, dealt.own, counts, strict=True)]
    return Federation(
        source.name,
        tuple(facts["classes"]),
        tuple(tensors["x"].shape[1:]),
        tuple(clients),
        Public(pick(dealt.tune), pick(dealt.holdout)) if len(dealt.tune) else None,
        pick_test(dealt.test),
        _fingerprint(facts["fingerprint"], dealt),
        counts,
    )


def _resident(x: Tensor, y: Tensor, used: list[Tensor], known: Known | None, facts: dict[str, Any]) -> Callable[[Tensor], Examples]:
    """A way to pick rows of x and y, of which only those `used` are kept in memory."""
    rows = torch.unique(torch.cat(used))
    if len(rows) < len(y):
        x, y = x[rows], y[rows]
    x = _normalised(x, known, facts)
    return lambda index: Examples(x, y, torch.searchsorted(rows, index))


def _normalised(x: Tensor, known: Known | None, facts: dict[str, Any]) -> Tensor:
    """Float32 (N, C, …) of raw (N, C, …): known constants where they fit, else the train split's own mean and std."""
    usual = known is not None and x.dtype == torch.uint8 and len(known.mean) == x.shape[1]
    mean, std = (
        ([m * known.scale for m in known.mean], [s * known.scale for s in known.std])
        if known and usual
        else (facts["mean"], facts["std"])
    )
    shape = (-1, *(1 for _ in x.shape[2:]))
    x = x.to(torch.float32, copy=True)
    return x.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))


def _fingerprint(content: str, dealt: Deal) -> str:
    digest = hashlib.blake2b(content.encode(), digest_size=16)
    for rows in (*dealt.train, *dealt.own, dealt.tune, dealt.holdout, dealt.test):
        digest.update(f"/{len(rows)}/".encode() + rows.numpy().tobytes())
    return digest.hexdigest()


# The cache: one safetensors file for each decoded data set and each deal, written whole or not at all.

_FORMAT = 1  # raise when what is stored under a key changes


def _cached(kind: str, key: Any, make: Callable[[], Stored]) -> Stored:
    """What `make` gives, read back from the cache where an undamaged file is kept there under (kind, key)."""
    folder = Path(os.environ.get("HETFL_CACHE") or os.path.expanduser("~/.cache/hetfl"))
    name = hashlib.blake2b(json.dumps([_FORMAT, key]).encode(), digest_size=16).hexdigest()
    path = folder / f"{kind}-{name}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, LookupError, TypeError, ValueError):
        return _read(path)
    stored = make()
    with contextlib.suppress(OSError, SafetensorError):  # goes on without a cache
        _write(path, *stored)
    return stored


def _read(path: Path) -> Stored:
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if facts.pop("checksum") != _checksum(tensors):
        raise ValueError("damaged")
    return tensors, facts


def _write(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        save_file(tensors, part, {"facts": json.dumps(facts | {"checksum": _checksum(tensors)})})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _checksum(tensors: dict[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].numpy().data, zlib.crc32(name.encode(), value))
    return value


# Where a data set is.


@dataclass(frozen=True)
class Source:
    """Where a data set is, before anything is read: parquet files by split, or (without files) the Hub's `hub`."""

    name: str
    identity: Any  # JSON-able; changes when the files do
    known: Known | None = None
    files: dict[str, list[Path]] | None = None
    hub: str = ""


def find(dataset: str) -> Source:
    """Where `dataset` is: a known short name (in $HETFL_DATA before the Hub), a folder, a parquet file or a Hub id.

    Raises UsageError where it is none of these, or a folder without parquet files.
    """
    name = next((short for short, known in KNOWN.items() if dataset == known.hub != ""), dataset)
    known = KNOWN.get(name)
    if name == "digits":
        return _local(name, Path(__file__).parent / "digits", known)
    shelf = os.environ.get("HETFL_DATA")
    if shelf and re.fullmatch(r"\w[\w.-]*", name) and os.path.isdir(os.path.join(shelf, name)):
        return _local(name, Path(shelf) / name, known)
    if known:
        return Source(name, f"hub:{known.hub}", known, hub=known.hub)
    return _unnamed(dataset)


def _unnamed(dataset: str) -> Source:
    path = Path(os.path.expanduser(dataset))
    if dataset and os.path.exists(path):
        return _local(path.resolve().stem if os.path.isfile(path) else path.resolve().name, path, None)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", dataset) and not dataset.endswith(".parquet"):
        return Source(dataset, f"hub:{dataset}", hub=dataset)
    if re.search(r"[/\\]|\.parquet$|^[.~]", dataset):
        raise UsageError(f"no folder or file '{dataset}' for --dataset{nearest(path.name, KNOWN)}")
    raise unknown("data set", dataset, KNOWN)


def _local(name: str, path: Path, known: Known | None) -> Source:
    if path.is_file() and path.suffix != ".parquet":
        raise UsageError(f"'{path}' is not a parquet file: --dataset takes a parquet file or a folder of them")
    found = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not found:
        raise UsageError(f"folder '{path}' holds no parquet file (it needs train*.parquet and should have test*.parquet)")
    files = _splits(path, found)
    if "train" not in files:
        raise UsageError(f"'{path}' has no train split: name its files train*.parquet and test*.parquet")
    states = [(str(file.relative_to(path)), (state := file.stat()).st_size, state.st_mtime_ns) for file in found]
    return Source(name, [str(path.resolve()), states], known, files)


def _splits(path: Path, found: list[Path]) -> dict[str, list[Path]]:
    """Files by the split that their names (or else their folders) say; all are train where none says anything."""
    files: dict[str, list[Path]] = {}
    for file in found:
        said = [split for part in reversed(file.relative_to(path).parts) if (split := _split_in(part))]
        files.setdefault(said[0] if said else "", []).append(file)
    return {"train": found} if list(files) == [""] else files


def _split_in(name: str) -> str | None:
    words = {"train": "training", "test": "testing|eval|evaluation", "validation": "valid|val|dev"}
    for split, others in words.items():
        if re.search(rf"(?<![a-z])({split}|{others})(?![a-z])", name.lower()):
            return split
    return None


# Reading and decoding: everything below runs on a cache miss only.


class _Columns(NamedTuple):
    input: str
    label: str
    owner: str | None

    def of(self, split: str) -> list[str]:
        """The columns to read of a split; one column may have two uses."""
        owner = [self.owner] if self.owner and split == "train" else []
        return list(dict.fromkeys([self.input, self.label, *owner]))


def _decoded(source: Source, options: DataOptions, progress: Progress) -> Stored:
    """Raw tensors x, y, test.x, test.y (where there is a test or validation split) and ids (natural partition)."""
    progress(f"reading {source.name}" if source.files else f"asking the Hub for {source.hub}")
    with quiet():
        features, splits = _opened(source)
        columns = _columns(source, options, features)
        tables = {split: splits[split](columns.of(split)) for split in ("train", "test", "validation") if split in splits}
    if not len(tables["train"]):
        raise UsageError(f"the train split of {source.name} has no rows")
    test = next((tables[split] for split in ("test", "validation") if split in tables and len(tables[split])), None)
    progress(f"decoding {sum(map(len, tables.values())):,} examples of {source.name} (once)")
    return _tensors(source, columns, features, tables["train"], test)


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
        if asked is None and usual in features:
            return str(usual)
        if asked is None and len(found) != 1:
            has = f"several {what} columns ({', '.join(found)})" if found else f"no {what} column"
            raise UsageError(f"{source.name} has {has}: name one with {flag} (columns: {', '.join(features)})")
        return asked or found[0]

    inputs = [name for name, feature in features.items() if _is_image(feature) or _is_numeric(feature)]
    owners = [name for name in features if name.lower() in OWNERS]
    return _Columns(
        choose("--input-column", options.input_column, known and known.input, "image or numeric input", inputs),
        choose("--label-column", options.label_column, known and known.label, "label", _label_columns(features)),
        choose("--id-column", options.id_column, None, "owner", owners) if options.partition == "natural" else None,
    )


def _label_columns(features: dict[str, Any]) -> list[str]:
    classes = [name for name, feature in features.items() if hasattr(feature, "int2str")]
    named = [name for name in features if name.lower() in LABELS]
    whole = [name for name in named if str(getattr(features[name], "dtype", "")).lstrip("u").startswith("int")]
    return [name for name in classes if name in named] or classes or whole


def _is_image(feature: Any) -> bool:
    return isinstance(feature, library("datasets").Image) or (isinstance(feature, dict) and "bytes" in feature)


def _is_numeric(feature: Any) -> bool:
    """Whether a feature is a list or array, of any depth, of numbers."""
    if not hasattr(feature, "feature") and not hasattr(feature, "shape"):
        return False
    while hasattr(feature, "feature"):
        feature = feature.feature
    return str(getattr(feature, "dtype", "")).lstrip("u").startswith(("int", "float", "bool"))


def _tensors(source: Source, columns: _Columns, features: dict[str, Any], train: Any, test: Any) -> Stored:
    tables = {"": train} | ({} if test is None else {"test.": test})
    classes, labels = _labels(source, columns.label, features[columns.label], list(tables.values()))
    tensors = {f"{part}y": y for part, y in zip(tables, labels, strict=True)}
    for part, table in tables.items():
        tensors[f"{part}x"] = _inputs(source, columns.input, features[columns.input], table[columns.input])
    if test is not None and tensors["x"].shape[1:] != tensors["test.x"].shape[1:]:
        raise UsageError(f"train and test inputs of {source.name} differ in shape: {_shapes([*tensors.values()][2:])}")
    mean, std = _moments(tensors["x"])
    facts = {"classes": classes, "mean": mean, "std": std, "fingerprint": _content(tensors, classes)}
    if columns.owner:
        tensors["ids"] = _numbered(source, columns.owner, [train[columns.owner].to_pylist()])[1][0]
    return tensors, facts


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
