"""Models with several exits: the heads that answer early, and the part of a model that an exit needs."""

from __future__ import annotations

import copy
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]

CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


class Reached(Exception):  # noqa: N818 (no error: the forward pass has come to its exit)
    """Raised in a forward pass at the last exit that is wanted."""

    def __init__(self, out: Tensor) -> None:
        self.out = out


class Exits(nn.Module):
    """`net` with a head after each of the modules `points` (names, in the order of their execution); the last exit is its own.

    The answer is that of the deepest exit that is there; with `every` set, the logits of all exits, (N, exits * classes).
    """

    def __init__(
        self, net: nn.Module, points: Sequence[str], heads: Sequence[nn.Module], reached: Sequence[frozenset[str]]
    ) -> None:
        super().__init__()
        self.net, self.points, self.heads = net, tuple(points), nn.ModuleList(heads)
        self.reached, self.depth, self.every = tuple(reached), len(points) + 1, False

    def forward(self, x: Tensor) -> Tensor:
        seen: dict[str, Tensor] = {}
        wanted = self.points[: self.depth]
        hooks = [self.net.get_submodule(p).register_forward_hook(self._at(p, seen)) for p in wanted]
        try:
            last = self.net(x)
        except Reached as end:
            last = self.heads[self.depth - 1](end.out)
        finally:
            for hook in hooks:
                hook.remove()
        if not self.every:
            return last  # type: ignore[no-any-return]
        early = [head(seen[p]) for p, head in zip(self.points[: self.depth - 1], self.heads, strict=False)]
        return torch.cat([*early, last], 1)

    def _at(self, point: str, seen: dict[str, Tensor]) -> Any:
        """A hook that notes what `point` gave, and ends the pass where no deeper exit is there."""
        place = self.points.index(point)

        def note(module: nn.Module, args: Any, out: Tensor) -> None:
            seen[point] = out
            if place == self.depth - 1:
                raise Reached(out)

        return note

    def at_depth(self, depth: int) -> Exits:
        """The first `depth` exits and what they need, sharing this model's tensors."""
        if depth > len(self.points):
            return self
        small = copy.deepcopy(self, {id(t): t for t in [*self.parameters(), *self.buffers()]})
        small.depth = depth
        small.heads = small.heads[:depth]
        for name, module in list(small.net.named_modules()):
            if name and name not in self.reached[depth - 1] and next(module.parameters(recurse=False), None) is not None:
                parent, _, attribute = name.rpartition(".")
                setattr(small.net.get_submodule(parent), attribute, nn.Identity())
        return small

    def names(self, depth: int) -> frozenset[str]:
        """The tensors of the first `depth` exits."""
        return frozenset(self.at_depth(depth).state_dict())


@contextmanager
def every(model: nn.Module) -> Generator[None, None, None]:
    """While it lasts, `model` answers with the logits of all its exits, where it has several."""
    has = hasattr(model, "every")
    if has:
        model.every = True  # type: ignore[assignment]
    try:
        yield
    finally:
        if has:
            model.every = False  # type: ignore[assignment]


@dataclass(frozen=True)
class End:
    """Where a stage ends: the module, the shape of its output (batch left out), what has run by then, and where channels are."""

    name: str
    shape: Shape
    run: frozenset[str]
    last: bool  # channels are the last dim, as in (tokens, channels), and not the first, as in (channels, height, width)

    @property
    def channels(self) -> int:
        return self.shape[-1] if self.last else self.shape[0]


def points(model: nn.Module, x: Tensor) -> list[End]:
    """The ends of `model`'s stages in order of execution.

    Looked at are the steps of the network: modules that stand, through nothing but containers, directly under `model`, run once
    and answer with features. A stage is a run of steps with as many channels; where that leaves one stage, every step with
    parameters of its own is one (a transformer's layers).
    """
    found = steps(model, x)
    ends = [a for a, b in zip(found, [*found[1:], None], strict=True) if b is None or a.channels != b.channels]
    return grown(model, ends if len(grown(model, ends)) > 2 else found)


def grown(model: nn.Module, ends: list[End]) -> list[End]:
    """`ends` without those by which no further parameters have come into play."""
    weighty = {name for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None}
    known: frozenset[str] = frozenset()
    found = []
    for end in ends:
        if (end.run - known) & weighty:
            found.append(end)
            known = end.run
    return found


def steps(model: nn.Module, x: Tensor) -> list[End]:
    """The steps of the network, run once on `x`."""
    names = {module: name for name, module in model.named_modules()}
    containers = {name for name, m in model.named_modules() if isinstance(m, nn.Sequential | nn.ModuleList)} | {""}
    started: list[nn.Module] = []
    ended: list[End] = []

    def before(module: nn.Module, args: Any) -> None:
        started.append(module)

    def after(module: nn.Module, args: Any, out: Any) -> None:
        name = names[module]
        if name not in containers and ancestors(name) <= containers and isinstance(out, Tensor) and featured(out, x):
            ended.append(End(name, tuple(out.shape[1:]), frozenset(names[m] for m in started), channels_last(started)))

    hooks = [m.register_forward_pre_hook(before) for m in names] + [m.register_forward_hook(after) for m in names]
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        for hook in hooks:
            hook.remove()
    silent = {name for module, name in names.items() if module not in started}
    return [replace(end, run=with_silent(end.run, silent)) for end in ended if counted(end.name, started, names) == 1]


def featured(out: Tensor, x: Tensor) -> bool:
    return out.ndim > 1 and out.is_floating_point() and len(out) == len(x)


def counted(name: str, started: Sequence[nn.Module], names: Mapping[nn.Module, str]) -> int:
    return sum(names[module] == name for module in started)


def channels_last(started: Sequence[nn.Module]) -> bool:
    """Whether the last layer with parameters was one of those that work on the last dim."""
    heavy = [m for m in started if next(m.parameters(recurse=False), None) is not None]
    return bool(heavy) and not isinstance(heavy[-1], CHANNELS_FIRST)


def ancestors(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(len(parts))}


def with_silent(run: frozenset[str], silent: set[str]) -> frozenset[str]:
    """Modules that are never called have their tensors used by the module around them."""
    return run | {name for name in silent if name.rpartition(".")[0] in run}


def with_exits(model: nn.Module, x: Tensor, classes: int, exits: int, convs: int) -> Exits:
    """`model` with heads after at most `exits - 1` of its stages, spread evenly.

    Where there are stages enough the last one has none, for the model's own classifier reads it.
    """
    ends = points(model, x)
    ends = ends[:-2] if len(ends) > exits else ends[:-1]
    chosen = [ends[i] for i in even(len(ends), exits - 1)]
    heads = [head(end, classes, convs) for end in chosen]
    return Exits(model, [end.name for end in chosen], heads, [end.run for end in chosen])


def even(number: int, wanted: int) -> list[int]:
    """`wanted` of `number` places, as evenly as can be; all, where there are fewer."""
    if wanted >= number:
        return list(range(number))
    return [round((i + 1) * (number + 1) / (wanted + 1)) - 1 for i in range(wanted)]


def head(end: End, classes: int, convs: int) -> nn.Module:
    """A classifier of features: for images `convs` 3x3 convolutions first, then the mean over positions and a linear layer."""
    dims = range(1, len(end.shape)) if end.last else range(2, len(end.shape) + 1)
    blocks = [conv_block(end.channels) for _ in range(convs)] if len(end.shape) == 3 and not end.last else []
    pooled = [Mean(list(dims))] if len(end.shape) > 1 else []
    return nn.Sequential(*blocks, *pooled, nn.Linear(end.channels, classes))


def conv_block(channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())


class Mean(nn.Module):
    """The mean over `dims`."""

    def __init__(self, dims: Sequence[int] = (1,)) -> None:
        super().__init__()
        self.dims = list(dims)

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)
