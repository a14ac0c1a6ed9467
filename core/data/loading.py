"""A run's data set: found, decoded, partitioned among clients, normalised."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hetfl.config import DataOptions
from hetfl.data.arrow import decode_arrow
from hetfl.data.cache import Stored, load_or_make, uncached
from hetfl.data.catalog import PICTURES, DataLocation, DatasetInfo, find_dataset
from hetfl.data.columns import Progress
from hetfl.data.dataset import ClientData, Examples, FederatedDataset, ServerData
from hetfl.data.inputs import Inputs, default_model
from hetfl.data.kinds import CLASSIFY, TaskKind, find_kind
from hetfl.data.npz import decode_npz
from hetfl.data.partition import Split, split_rows
from hetfl.data.pictures import decode_pictures
from hetfl.data.targets import group_of, scale_targets
from hetfl.data.tokens import PAD, identify_tokenizer
from hetfl.digest import digest_json, digest_tensors
from hetfl.errors import UsageError

# Options that do not change who holds which rows.
NOT_OF_THE_PARTITION = set("dataset input_column label_column mean std target_mean target_std tokens vocab tokenizer".split())


def ignore_progress(message: str) -> None:
    """Reports nothing."""


def load(options: DataOptions, progress: Progress = ignore_progress) -> FederatedDataset:
    """The federated data set that `options` describe; the same options give the same bits, from the cache or not.

    `progress` is called with a sentence before what takes long. Raises UsageError, one sentence, where data cannot be had or
    partitioned as asked.
    """
    source = find_dataset(options.dataset)
    natural = options.partition == "natural"
    columns = [options.input_column, options.label_column, options.id_column if natural else None, natural]
    key = [source.identity, columns, options.tokens, options.vocab, options.task, identify_tokenizer(options.tokenizer)]
    keep = load_or_make if source.decode is None else uncached
    tensors, facts = keep("data", key, partial(source.decode or partial(_decode, source), options, progress))
    how = options.model_dump(include=set(DataOptions.model_fields) - NOT_OF_THE_PARTITION)
    rows, _ = keep("partition", [key, facts["fingerprint"], how], partial(_partition_rows, options, tensors, progress))
    clients = range(sum(name.startswith("train.") for name in rows))
    train, own = (tuple(rows[f"{part}.{i}"] for i in clients) for part in ("train", "own"))
    return _build_dataset(options, source, tensors, facts, Split(train, own, rows["tune"], rows["holdout"], rows["test"]))


def _decode(source: DataLocation, options: DataOptions, progress: Progress) -> Stored:
    """The raw tensors x, y, test.x, test.y and ids of a data set, with the facts about them."""
    progress(f"reading {source.name}" if source.files or source.splits else f"asking the Hub for {source.hub}")
    if source.files and source.files["train"][0].suffix == ".npz":
        return decode_npz(source, options)
    if source.files and source.files["train"][0].suffix.lower() in PICTURES:
        return decode_pictures(source)
    return decode_arrow(source, options, progress)


def _partition_rows(options: DataOptions, tensors: dict[str, Tensor], progress: Progress) -> Stored:
    """The rows (int64, ascending) of every part of the Split: tune, holdout, test, train.0, own.0, train.1, …"""
    progress(f"partitioning {len(tensors['y']):,} examples ({options.partition})")
    return _name_rows(split_rows(options, group_of(tensors), tensors.get("test.y"), tensors.get("ids"))), {}


def _name_rows(split: Split) -> dict[str, Tensor]:
    clients = {f"{part}.{i}": rows for part in ("train", "own") for i, rows in enumerate(getattr(split, part))}
    return {"tune": split.tune, "holdout": split.holdout, "test": split.test, **clients}


def fingerprint_split(content: str, split: Split) -> str:
    """A digest of who holds which rows of a data set whose fingerprint is `content`."""
    return digest_json([content, digest_tensors(_name_rows(split))])


def _build_dataset(
    options: DataOptions, source: DataLocation, tensors: dict[str, Tensor], facts: dict[str, Any], split: Split
) -> FederatedDataset:
    """The data set of a run from the raw tensors and the rows of each part."""
    has_test, classes = "test.y" in tensors, len(facts["classes"])
    used = [*split.train, *split.own, split.tune, split.holdout, *([] if has_test else [split.test])]
    found = facts["columns"] | _choose_normalization(options, source.known, tensors["x"], facts)
    kind = find_kind(facts.get("task", CLASSIFY.name))
    if options.task not in (None, kind.name):
        raise UsageError(f"the examples of {source.name} have classes and nothing else, so --task {options.task} is not possible")
    found |= {"task": kind.name, **_choose_scale(options, kind, tensors["y"][torch.cat([*split.train, split.tune, split.holdout])])}
    pick = _make_picker(tensors["x"], tensors["y"], used, found)
    pick_test = _make_picker(tensors["test.x"], tensors["test.y"], [split.test], found) if has_test else pick
    examples = len(tensors["y"]) - (0 if has_test else len(split.test))
    held = sum(map(len, [*split.train, *split.own, split.tune, split.holdout]))
    counts = torch.stack([group_of(tensors)[rows].bincount(minlength=classes) for rows in split.train])
    clients = [ClientData(pick(train), pick(own), n) for train, own, n in zip(split.train, split.own, counts, strict=True)]
    vocab = found.get("vocab")
    outputs = vocab if vocab and kind.tokens else facts.get("outputs", classes)
    inputs = Inputs(tuple(tensors["x"].shape[1:]), outputs, vocab, kind, facts.get("pad", PAD))
    return FederatedDataset(
        dataset=source.name,
        classes=tuple(facts["classes"]),
        clients=tuple(clients),
        public=ServerData(pick(split.tune), pick(split.holdout)) if len(split.tune) else None,
        test=pick_test(split.test),
        fingerprint=fingerprint_split(facts["fingerprint"], split),
        class_counts=counts,
        inputs=inputs,
        model=_choose_model(source.known, inputs),
        preprocessing=found,
        unused=min(examples, options.limit or examples) - held,
    )


def _choose_model(known: DatasetInfo | None, inputs: Inputs) -> str:
    """The model of a known data set where the inputs have as many dims as its own, else the default for such inputs."""
    alike = known is not None and (inputs.vocab is not None if known.text else len(inputs.shape) == len(known.shape))
    return known.model if known and alike and known.task == inputs.kind.name else default_model(inputs)


def _make_picker(x: Tensor, y: Tensor, used: list[Tensor], found: dict[str, Any]) -> Callable[[Tensor], Examples]:
    """A function from rows of x (N, *shape) and y (N, …) to these Examples; of x and y only the rows `used` stay in memory."""
    rows = torch.unique(torch.cat(used))
    if len(rows) < len(y):
        x, y = x[rows], y[rows]
    x = x.long() if "vocab" in found else _normalize(x, found["mean"], found["std"])
    if "target_mean" in found:
        y = scale_targets(y, found["target_mean"], found["target_std"])
    kind = find_kind(found["task"])
    return lambda index: Examples(x, y, torch.searchsorted(rows, index), kind)


def _choose_scale(options: DataOptions, kind: TaskKind, y: Tensor) -> dict[str, tuple[float, ...]]:
    """Mean and std of each target, where its kind is normalised: as given, else those of y, the targets of what is trained on.

    Raises UsageError.
    """
    mean, std = kind.find_scale(y)
    for name, given in (("target-mean", options.target_mean), ("target-std", options.target_std)):
        if given and len(given) != len(mean):
            raise UsageError(f"--{name} has {len(given)} values, but task {kind.name} has {len(mean)} targets to normalise here")
    if not all(s > 0 for s in options.target_std):
        raise UsageError("--target-std must be above 0 for every target")
    return {"target_mean": options.target_mean or mean, "target_std": options.target_std or std} if mean else {}


def _choose_normalization(options: DataOptions, known: DatasetInfo | None, x: Tensor, facts: dict[str, Any]) -> dict[str, Any]:
    """Mean and std of each channel: as given, else known constants where they fit, else the train split's own.

    For text, the size of the vocabulary and the tokens of an example. Raises UsageError for values that do not fit the channels.
    """
    if "vocab" in facts:
        given = options.vocab if "vocab" in options.model_fields_set else 0
        return {"vocab": max(facts["vocab"], given), "tokens": x.shape[1]}
    usual = known is not None and x.dtype == torch.uint8 and len(known.mean) == x.shape[1]
    found = {}
    for name in ("mean", "std"):
        given = getattr(options, name)
        if given and len(given) != x.shape[1]:
            raise UsageError(f"--{name} has {len(given)} values, but the inputs have {x.shape[1]} channels")
        constants = [v * known.scale for v in getattr(known, name)] if known and usual else facts[name]
        found[name] = tuple(given or constants)
    if not all(s > 0 for s in found["std"]):
        raise UsageError("--std must be above 0 for every channel")
    return found


def _normalize(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(x - mean) / std of each channel of x (N, C, …), in float32."""
    shape = (-1, *(1 for _ in x.shape[2:]))
    x = x.to(torch.float32, copy=True)
    return x.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))
