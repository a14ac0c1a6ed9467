"""A run's data set: loaded, dealt to clients, normalised."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hetfl.config import DataOptions
from hetfl.data.arrow import decoded
from hetfl.data.cache import Stored, cached, uncached
from hetfl.data.catalog import DataLocation, DatasetInfo, find
from hetfl.data.columns import Progress
from hetfl.data.dataset import ClientData, Examples, FederatedDataset, ServerData
from hetfl.data.inputs import Inputs, default
from hetfl.data.partition import Split, deal
from hetfl.errors import UsageError

UNDEALT = {"dataset", "input_column", "label_column", "mean", "std", "tokens", "vocab"}  # options that deal nothing out


def silent(message: str) -> None:
    """Report nothing."""


def load(options: DataOptions, progress: Progress = silent) -> FederatedDataset:
    """The federation that `options` describe; the same options give the same bits, from the cache or not.

    `progress` hears of what takes long. Raises UsageError, one sentence, where data cannot be had or dealt as asked.
    """
    source = find(options.dataset)
    natural = options.partition == "natural"
    columns = [options.input_column, options.label_column, options.id_column if natural else None, natural]
    key = [source.identity, columns, options.tokens, options.vocab]
    keep = cached if source.decode is None else uncached
    tensors, facts = keep("data", key, partial(source.decode or partial(decoded, source), options, progress))
    dealt = options.model_dump(include=set(DataOptions.model_fields) - UNDEALT)
    rows, _ = keep("deal", [key, facts["fingerprint"], dealt], partial(_dealt, options, tensors, progress))
    clients = range(sum(name.startswith("train.") for name in rows))
    train, own = (tuple(rows[f"{part}.{i}"] for i in clients) for part in ("train", "own"))
    return _federation(options, source, tensors, facts, Split(train, own, rows["tune"], rows["holdout"], rows["test"]))


def _dealt(options: DataOptions, tensors: dict[str, Tensor], progress: Progress) -> Stored:
    progress(f"dealing out {len(tensors['y']):,} examples ({options.partition})")
    dealt = deal(options, tensors["y"], tensors.get("test.y"), tensors.get("ids"))
    numbered = {f"{part}.{i}": rows for part in ("train", "own") for i, rows in enumerate(getattr(dealt, part))}
    return {"tune": dealt.tune, "holdout": dealt.holdout, "test": dealt.test, **numbered}, {}


def _federation(
    options: DataOptions, source: DataLocation, tensors: dict[str, Tensor], facts: dict[str, Any], dealt: Split
) -> FederatedDataset:
    apart, classes = "test.y" in tensors, len(facts["classes"])
    used = [*dealt.train, *dealt.own, dealt.tune, dealt.holdout, *([] if apart else [dealt.test])]
    found = facts["columns"] | _scaling(options, source.known, tensors["x"], facts)
    pick = _resident(tensors["x"], tensors["y"], used, found)
    pick_test = _resident(tensors["test.x"], tensors["test.y"], [dealt.test], found) if apart else pick
    counts = torch.stack([tensors["y"][rows].bincount(minlength=classes) for rows in dealt.train])
    clients = [ClientData(pick(train), pick(own), count) for train, own, count in zip(dealt.train, dealt.own, counts, strict=True)]
    inputs = Inputs(tuple(tensors["x"].shape[1:]), classes, facts.get("vocab"))
    return FederatedDataset(
        source.name, tuple(facts["classes"]), tuple(clients),
        ServerData(pick(dealt.tune), pick(dealt.holdout)) if len(dealt.tune) else None,
        pick_test(dealt.test), _fingerprint(facts["fingerprint"], dealt), counts, inputs, _model(source.known, inputs), found,
    )  # fmt: skip


def _model(known: DatasetInfo | None, inputs: Inputs) -> str:
    """The model of a known data set, where the data have its shape."""
    alike = known is not None and (inputs.vocab is not None if known.text else len(inputs.shape) == len(known.shape))
    return known.model if known and alike else default(inputs)


def _resident(x: Tensor, y: Tensor, used: list[Tensor], found: dict[str, Any]) -> Callable[[Tensor], Examples]:
    """A way to pick rows of x and y, of which only those `used` are kept in memory."""
    rows = torch.unique(torch.cat(used))
    if len(rows) < len(y):
        x, y = x[rows], y[rows]
    x = x.long() if "vocab" in found else _normalised(x, found["mean"], found["std"])
    return lambda index: Examples(x, y, torch.searchsorted(rows, index))


def _scaling(options: DataOptions, known: DatasetInfo | None, x: Tensor, facts: dict[str, Any]) -> dict[str, Any]:
    """What the inputs are normalised by: as given, else known constants where they fit, else the train split's own."""
    if "vocab" in facts:
        return {"vocab": facts["vocab"], "tokens": x.shape[1]}
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


def _normalised(x: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Float32 (N, C, …) of raw (N, C, …)."""
    shape = (-1, *(1 for _ in x.shape[2:]))
    x = x.to(torch.float32, copy=True)
    return x.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))


def _fingerprint(content: str, dealt: Split) -> str:
    digest = hashlib.blake2b(content.encode(), digest_size=16)
    for rows in (*dealt.train, *dealt.own, dealt.tune, dealt.holdout, dealt.test):
        digest.update(f"/{len(rows)}/".encode() + rows.numpy().tobytes())
    return digest.hexdigest()
