"""Data sets in memory and the federation dealt from them; decoded once, then read back from the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hetfl.core.cache import Stored, cached
from hetfl.core.config import DataOptions
from hetfl.core.decode import Progress, decoded
from hetfl.core.errors import UsageError
from hetfl.core.factories import Inputs, default
from hetfl.core.partition import Deal, deal
from hetfl.core.sources import Known, Source, find


@dataclass(frozen=True, eq=False)
class Examples:
    """Some rows of a resident tensor: batches are taken by index, so all clients share one copy."""

    x: Tensor  # (N, *shape): float32, normalised, or int64 token ids
    y: Tensor  # int64 (N,)
    index: Tensor  # int64, the rows that are ours, ascending

    def __len__(self) -> int:
        return len(self.index)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches x (size, *shape), y (size,), each example once, shuffled by `generator`; the last may be short."""
        for rows in self.rows(size, generator):
            yield self.x[rows], self.y[rows]

    def rows(self, size: int, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """The same batches as positions in `x` and `y`."""
        index = self.index if generator is None else self.index.index_select(0, torch.randperm(len(self), generator=generator))
        return index.split(size) if len(index) else ()

    def split(self, every: int = 5) -> tuple[Examples, Examples]:
        """Two parts that never change: all but each `every`-th example, and these; fewer than `every` stand in both."""
        if len(self) < every:
            return self, self
        held = torch.arange(len(self)) % every == every - 1
        return Examples(self.x, self.y, self.index[~held]), Examples(self.x, self.y, self.index[held])

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
    clients: tuple[Holding, ...]
    public: Public | None
    test: Examples
    fingerprint: str  # equal iff the same people hold the same examples
    counts: Tensor  # int64 (clients, classes) of the clients' train examples
    inputs: Inputs  # what a model is to be built for
    model: str  # the one to take where none is named
    preprocessing: dict[str, Any]  # the data options that were left open, as they were found

    def on(self, device: str) -> Federation:
        """The same with all examples resident on `device`; who holds which stays where it is."""
        if torch.device(device).type == "cpu":
            return self
        moved: dict[int, Tensor] = {}

        def there(part: Examples) -> Examples:
            x, y = (moved.setdefault(id(t), t.to(device)) for t in (part.x, part.y))
            return Examples(x, y, part.index)

        clients = tuple(replace(c, train=there(c.train), test=there(c.test)) for c in self.clients)
        public = self.public and Public(there(self.public.tune), there(self.public.holdout))
        return replace(self, clients=clients, public=public, test=there(self.test))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input."""
        return self.inputs.shape


UNDEALT = {"dataset", "input_column", "label_column", "mean", "std", "tokens", "vocab"}  # options that deal nothing out


def silent(message: str) -> None:
    """Report nothing."""


def load(options: DataOptions, progress: Progress = silent) -> Federation:
    """The federation that `options` describe; the same options give the same bits, from the cache or not.

    `progress` hears of what takes long. Raises UsageError, one sentence, where data cannot be had or dealt as asked.
    """
    source = find(options.dataset)
    natural = options.partition == "natural"
    columns = [options.input_column, options.label_column, options.id_column if natural else None, natural]
    key = [source.identity, columns, options.tokens, options.vocab]
    tensors, facts = cached("data", key, partial(decoded, source, options, progress))
    dealt = options.model_dump(include=set(DataOptions.model_fields) - UNDEALT)
    rows, _ = cached("deal", [key, facts["fingerprint"], dealt], partial(_dealt, options, tensors, progress))
    clients = range(sum(name.startswith("train.") for name in rows))
    train, own = (tuple(rows[f"{part}.{i}"] for i in clients) for part in ("train", "own"))
    return _federation(options, source, tensors, facts, Deal(train, own, rows["tune"], rows["holdout"], rows["test"]))


def _dealt(options: DataOptions, tensors: dict[str, Tensor], progress: Progress) -> Stored:
    progress(f"dealing out {len(tensors['y']):,} examples ({options.partition})")
    dealt = deal(options, tensors["y"], tensors.get("test.y"), tensors.get("ids"))
    numbered = {f"{part}.{i}": rows for part in ("train", "own") for i, rows in enumerate(getattr(dealt, part))}
    return {"tune": dealt.tune, "holdout": dealt.holdout, "test": dealt.test, **numbered}, {}


def _federation(options: DataOptions, source: Source, tensors: dict[str, Tensor], facts: dict[str, Any], dealt: Deal) -> Federation:
    apart, classes = "test.y" in tensors, len(facts["classes"])
    used = [*dealt.train, *dealt.own, dealt.tune, dealt.holdout, *([] if apart else [dealt.test])]
    found = facts["columns"] | _scaling(options, source.known, tensors["x"], facts)
    pick = _resident(tensors["x"], tensors["y"], used, found)
    pick_test = _resident(tensors["test.x"], tensors["test.y"], [dealt.test], found) if apart else pick
    counts = torch.stack([tensors["y"][rows].bincount(minlength=classes) for rows in dealt.train])
    clients = [Holding(pick(train), pick(own), count) for train, own, count in zip(dealt.train, dealt.own, counts, strict=True)]
    inputs = Inputs(tuple(tensors["x"].shape[1:]), classes, facts.get("vocab"))
    return Federation(
        source.name, tuple(facts["classes"]), tuple(clients),
        Public(pick(dealt.tune), pick(dealt.holdout)) if len(dealt.tune) else None,
        pick_test(dealt.test), _fingerprint(facts["fingerprint"], dealt), counts, inputs, _model(source.known, inputs), found,
    )  # fmt: skip


def _model(known: Known | None, inputs: Inputs) -> str:
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


def _scaling(options: DataOptions, known: Known | None, x: Tensor, facts: dict[str, Any]) -> dict[str, Any]:
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


def _fingerprint(content: str, dealt: Deal) -> str:
    digest = hashlib.blake2b(content.encode(), digest_size=16)
    for rows in (*dealt.train, *dealt.own, dealt.tune, dealt.holdout, dealt.test):
        digest.update(f"/{len(rows)}/".encode() + rows.numpy().tobytes())
    return digest.hexdigest()
