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
from hetfl.data.columns import LABELS, OWNERS, Columns, Progress, describe_tensors, first_line, format_shapes, number_values
from hetfl.data.kinds import TaskKind, find_kind, next_tokens
from hetfl.data.lazy import import_library, mute_output
from hetfl.data.targets import describe_targets
from hetfl.data.tokens import pad_of, tokenize
from hetfl.data.wide import is_number, join_scalars, list_scalars
from hetfl.errors import UsageError, unknown

PROMPT = "prompt"  # the column of texts that come before the inputs and are not to be learned

NUMERIC = ("int", "float", "double", "halffloat", "bool")


def decode_arrow(source: DataLocation, options: DataOptions, progress: Progress) -> Stored:
    """The raw tensors x, y, test.x, test.y (where there is a test or validation split) and ids (natural partition), with facts.

    x is (N, C, H, W) for images, (N, *shape) for numbers and (N, tokens) for text. Raises UsageError where columns or values do
    not serve.
    """
    with mute_output():
        features, readers = _open_splits(source)
        inputs = [n for n, f in features.items() if _is_image(f) or _is_numeric(f) or (_is_text(f) and n not in LABELS)]
        scalars = list_scalars(options, features) if not {*inputs} - {options.label_column} and not options.input_column else []
        features, readers = join_scalars(features, scalars, readers) if len(scalars) > 1 else (features, readers)
        columns = _choose_columns(source, options, features)
        tables = {split: readers[split](columns.to_read(split)) for split in ("train", "test", "validation") if split in readers}
    if not len(tables["train"]):
        raise UsageError(f"the train split of {source.name} has no rows")
    test = next((tables[split] for split in ("test", "validation") if split in tables and len(tables[split])), None)
    progress(f"decoding {sum(map(len, tables.values())):,} examples of {source.name} (once)")
    return _decode_tensors(source, options, columns, features, tables["train"], test)


def _open_splits(source: DataLocation) -> tuple[dict[str, Any], dict[str, Callable[[list[str]], Any]]]:
    """The features of a data set, and for each split a function that reads columns of it into one Arrow table."""
    datasets = import_library("datasets")
    if source.files is None:
        splits = _load_hub_splits(source) if source.splits is None else source.splits
        return splits["train"].features, {name: partial(_read_hub, split) for name, split in splits.items()}
    if source.files["train"][0].suffix == ".csv":
        tables = {split: datasets.Dataset(datasets.table.InMemoryTable(_read_csv(files))) for split, files in source.files.items()}
        return tables["train"].features, {name: partial(_read_hub, split) for name, split in tables.items()}
    with _report_unreadable(source.files["train"][0]) as file:
        features = datasets.Features.from_arrow_schema(import_library("pyarrow.parquet").read_schema(file))
    return features, {split: partial(_read_files, files) for split, files in source.files.items()}


def _read_hub(split: Any, columns: list[str]) -> Any:
    """The columns of a split of `datasets` as one Arrow table."""
    return split.select_columns(columns).with_format("arrow")[:]


@contextlib.contextmanager
def _report_unreadable(file: Path) -> Iterator[Path]:
    """Raises UsageError for whatever goes wrong while `file` is read."""
    try:
        yield file
    except (OSError, LookupError, TypeError, ValueError, import_library("pyarrow").ArrowException) as error:
        raise UsageError(f"'{file}' cannot be read as {file.suffix.lstrip('.') or 'parquet'}: {first_line(error)}") from error


def _read_files(files: list[Path], columns: list[str]) -> Any:
    """The columns of parquet files as one Arrow table."""
    tables = []
    for path in files:
        with _report_unreadable(path) as file:
            parquet = import_library("pyarrow.parquet").ParquetFile(file)
            if lacking := [column for column in columns if column not in parquet.schema_arrow.names]:
                raise ValueError(f"it has no column '{lacking[0]}'")
            tables.append(parquet.read(columns).select(columns))
    with _report_unreadable(files[0].parent):
        return import_library("pyarrow").concat_tables(tables)


def _read_csv(files: list[Path]) -> Any:
    """CSV files with a line of column names as one Arrow table."""
    csv, pyarrow = import_library("pyarrow.csv"), import_library("pyarrow")
    tables = []
    for path in files:
        with _report_unreadable(path) as file:
            tables.append(csv.read_csv(file))
    with _report_unreadable(files[0].parent):
        return pyarrow.concat_tables(tables)


def _load_hub_splits(source: DataLocation) -> dict[str, Any]:
    """The splits of a Hub data set, downloaded or from the cache of `datasets`."""
    hub, datasets, name = import_library("huggingface_hub"), import_library("datasets"), source.hub
    place = f", or put into $HETFL_DATA as '{source.name}'" if source.known else ""
    instead = f"; the folder of a local copy can be given instead{place}"
    try:
        revision = None if hub.is_offline_mode() else hub.HfApi().dataset_info(name, timeout=10).sha
        splits: dict[str, Any] = dict(datasets.load_dataset(name, revision=revision))
    except hub.errors.RepositoryNotFoundError as error:
        raise UsageError(f"the Hub has no data set '{name}' that is open to you{instead}") from error
    except Exception as error:  # whatever httpx, the Hub's client or a data set's files can raise
        lost = isinstance(error, OSError | import_library("httpx").TransportError)
        why = f"there is no such folder here and the Hub could not be reached ({first_line(error)})" if lost else first_line(error)
        raise UsageError(f"cannot load data set '{name}': {why}{instead}") from error
    if "train" not in splits:
        raise UsageError(f"data set '{name}' has no train split (it has {', '.join(splits)})")
    return splits


def _choose_columns(source: DataLocation, options: DataOptions, features: dict[str, Any]) -> Columns:
    """The columns that the options name, else the known data set's, else the only ones of their kind. Raises UsageError."""
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

    possible = {n: f for n, f in features.items() if n not in {*LABELS, options.label_column, PROMPT}}
    inputs = [name for name, feature in possible.items() if _is_image(feature) or _is_numeric(feature)]
    inputs = inputs or [name for name, feature in possible.items() if _is_text(feature)]
    labels, needs_none = _label_columns(features), options.task is not None and find_kind(options.task).tokens
    owners = [name for name in features if name.lower() in OWNERS]
    return Columns(
        choose("--input-column", options.input_column, known.input if known else None, "image, numeric or text input", inputs),
        None
        if needs_none and not (labels or options.label_column)
        else choose("--label-column", options.label_column, known.label if known else None, "label", labels),
        choose("--id-column", options.id_column, known.owner if known else None, "owner", owners)
        if options.partition == "natural"
        else None,
        PROMPT if needs_none and options.input_column is None and PROMPT in features and not known else None,
    )


def _label_columns(features: dict[str, Any]) -> list[str]:
    """Columns that may be the label: class labels of a usual name, else all class labels, else numbers of a usual name."""
    classes = [name for name, feature in features.items() if hasattr(feature, "int2str")]
    named = [name for name in features if name.lower() in LABELS]
    numbers = [name for name in named if is_number(features[name]) or _is_numeric(features[name])]
    return [name for name in classes if name in named] or classes or numbers


def _guess_kind(feature: Any) -> str:
    """The name of the kind of task of a column of labels or targets that no option says it of."""
    if _is_numeric(feature):
        kind = feature
        while hasattr(kind, "feature"):
            kind = kind.feature
        return "regress" if str(kind.dtype).startswith("float") else "multilabel"
    return "regress" if is_number(feature) and str(feature.dtype).startswith(("float", "double")) else "classify"


def _is_image(feature: Any) -> bool:
    """Whether a feature is an image: of `datasets`' own type, or a struct with encoded bytes."""
    return isinstance(feature, import_library("datasets").Image) or (isinstance(feature, dict) and "bytes" in feature)


def _is_text(feature: Any) -> bool:
    return str(getattr(feature, "dtype", "")) in ("string", "large_string") and not hasattr(feature, "int2str")


def _is_numeric(feature: Any) -> bool:
    """Whether a feature is a list or array, of any depth, of numbers."""
    if not hasattr(feature, "feature") and not hasattr(feature, "shape"):
        return False
    while hasattr(feature, "feature"):
        feature = feature.feature
    return str(getattr(feature, "dtype", "")).lstrip("u").startswith(("int", "float", "bool"))


def _decode_tensors(
    source: DataLocation, options: DataOptions, columns: Columns, features: dict[str, Any], train: Any, test: Any
) -> Stored:
    """The columns of the Arrow tables `train` and `test` (or None) as tensors, with the facts about them."""
    tables = {"": train} | ({} if test is None else {"test.": test})
    feature, text = features.get(columns.label or ""), _is_text(features[columns.input])
    kind = find_kind(options.task or _guess_kind(feature))
    x = {part: _decode_inputs(source, options, columns, features[columns.input], table, kind) for part, table in tables.items()}
    named = feature is not None and (kind.by_class or (kind.tokens and not _is_numeric(feature)))  # else numbers
    classes, labels = _decode_labels(source, str(columns.label), feature, list(tables.values())) if named else ([], [])
    tensors, facts = {f"{part}x": each for part, each in x.items()}, dict[str, Any]()
    facts |= {"vocab": options.vocab, "pad": pad_of(options)} if text else {}
    if kind.by_class:
        tensors |= {f"{part}y": y for part, y in zip(tables, labels, strict=True)}
    else:
        targets = partial(_decode_targets, source, options, columns, named)
        numbers = {part: (x[part], targets(x[part], table)) for part, table in tables.items()}
        found, known = describe_targets(kind, source.name, numbers, labels=(classes, labels[0]) if named else None)
        tensors, facts, classes = tensors | found, known | facts, known["classes"]
        facts |= {"outputs": facts["vocab"]} if kind.tokens else {}
    if columns.owner:
        tensors["ids"] = number_values(source, columns.owner, [train[columns.owner].to_pylist()])[1][0]
    return describe_tensors(source, tensors, classes, columns, facts)


def _decode_targets(
    source: DataLocation, options: DataOptions, columns: Columns, named: bool, x: Tensor, table: Any
) -> Tensor | None:
    """Numbers (N, …) of the label column, or the next tokens of inputs that begin with a prompt; None where there are neither."""
    if columns.prompt:
        pad, prompts = pad_of(options), tokenize(_read_texts(source, columns.prompt, table), options)
        return next_tokens(x, x != pad, (prompts != pad).sum(1))
    if columns.label is None or named:
        return None if x.is_floating_point() else next_tokens(x, x != pad_of(options))
    where = f"column '{columns.label}' of {source.name}"
    chunks = table[columns.label].chunks
    if not all(hasattr(chunk.type, "value_type") or str(chunk.type).lstrip("u").startswith(NUMERIC) for chunk in chunks):
        raise UsageError(f"{where} holds no numbers")
    return torch.cat([_decode_numbers(where, chunk) for chunk in chunks if len(chunk)])


def _read_texts(source: DataLocation, column: str, table: Any) -> list[str]:
    """The texts of a column. Raises UsageError where one is missing."""
    texts = table[column].to_pylist()
    if None in texts:
        raise UsageError(f"column '{column}' of {source.name} has missing values")
    return list(texts)


def _decode_labels(source: DataLocation, column: str, feature: Any, tables: list[Any]) -> tuple[list[str], list[Tensor]]:
    """Names of the classes, and int64 labels (N,) of each table; values other than ClassLabels are numbered."""
    values = [table[column].to_pylist() for table in tables]
    if not hasattr(feature, "int2str"):
        if not str(getattr(feature, "dtype", "")).lstrip("u").startswith(("int", "bool", "string", "large_string")):
            raise UsageError(f"column '{column}' of {source.name} holds no class labels (whole numbers or strings)")
        return number_values(source, column, values)
    names = list(feature.names)
    if any(value is None or not 0 <= value < len(names) for part in values for value in part):
        raise UsageError(f"column '{column}' of {source.name} has examples without a label")
    return names, [torch.tensor(part, dtype=torch.int64) for part in values]


def _decode_inputs(
    source: DataLocation, options: DataOptions, columns: Columns, feature: Any, table: Any, kind: TaskKind
) -> Tensor:
    """Images as uint8 (N, C, H, W); text as token ids (N, tokens); numbers as uint8 or float32 (N, *shape), where 2-D arrays get
    one channel, or as token ids where tokens are to be learned."""
    where, chunks = f"column '{columns.input}' of {source.name}", table[columns.input]
    if _is_text(feature):
        texts = _read_texts(source, columns.input, table)
        if columns.prompt:
            texts = [f"{a} {b}" for a, b in zip(_read_texts(source, columns.prompt, table), texts, strict=True)]
        return tokenize(texts, options)
    if _is_image(feature):
        cast = getattr(feature, "cast_storage", lambda storage: storage)
        return decode_images(where, [entry for chunk in chunks.chunks for entry in cast(chunk).to_pylist()])
    if not _is_numeric(feature):
        raise UsageError(f"{where} holds neither images nor arrays of numbers")
    arrays = [_decode_numbers(where, chunk) for chunk in chunks.chunks if len(chunk)]
    if len({array.shape[1:] for array in arrays}) > 1:
        raise UsageError(f"{where} has arrays of different shapes ({format_shapes(arrays[:2])})")
    x = torch.cat(arrays)
    if not x.isfinite().all():
        raise UsageError(f"{where} has values that are not finite")
    if kind.tokens and x.dim() == 2 and bool((x == x.round()).all()) and bool((x >= 0).all()):
        return x.long()
    return x.unsqueeze(1) if x.dim() == 3 else x


def _decode_numbers(where: str, array: Any) -> Tensor:
    """An Arrow array of N (nested) lists of one shape as a tensor (N, *shape), uint8 or float32. Raises UsageError."""
    compute = import_library("pyarrow.compute")
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


def decode_images(where: str, entries: list[dict[str, Any]]) -> Tensor:
    """Encoded images of one size as uint8 (N, C, H, W), C 1 where all are grey, else 3. Raises UsageError."""
    numpy, pillow = import_library("numpy"), import_library("PIL.Image")
    pixels = [numpy.asarray(_decode_image(pillow, where, entry)) for entry in entries]
    if len({array.ndim for array in pixels}) > 1:  # grey among coloured ones
        pixels = [array if array.ndim == 3 else numpy.stack([array] * 3, axis=-1) for array in pixels]
    if len(sizes := sorted({array.shape for array in pixels})) > 1:
        raise UsageError(
            f"{where} has images of different sizes ({sizes[0][:2]} and {sizes[-1][:2]}): resize them first, such as "
            "with PIL.Image.open(file).resize((64, 64)).save(file) for every one of them"
        )
    x = torch.from_numpy(numpy.stack(pixels))
    return x.unsqueeze(1) if x.dim() == 3 else x.permute(0, 3, 1, 2).contiguous()


def _decode_image(pillow: Any, where: str, entry: dict[str, Any]) -> Any:
    """The decoded image of an entry with bytes or a path: mode L if it is grey, else RGB."""
    try:
        with pillow.open(io.BytesIO(entry["bytes"]) if entry["bytes"] else entry["path"]) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"mode {image.mode} is not 8 bits a channel")
            return image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    except (OSError, SyntaxError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{where} has an image that cannot be decoded: {first_line(error)}") from error
