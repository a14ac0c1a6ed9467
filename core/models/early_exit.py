"""Networks with several exits: classifiers after early stages, and the part of the network that an exit needs (ScaleFL)."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hetfl.errors import NotApplicable
from hetfl.models.frozen import MARK
from hetfl.models.watching import run_watched

CHANNELS_FIRST = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


class ExitReached(Exception):  # noqa: N818 (no error: the forward pass is complete)
    """Ends a forward pass at the deepest exit that is wanted; `out` is what its stage gave."""

    def __init__(self, out: Tensor) -> None:
        self.out = out


class MultiExitNet(nn.Module):
    """`net` with the classifiers `heads` after its modules `points` (names, in order of execution); the last exit is its own.

    `reached[i]` has the names of the modules that have run by exit i. Answers with the logits (N, classes) of the deepest of the
    first `depth` exits; with `every` set, with those of all of them side by side, (N, depth * classes).
    """

    def __init__(
        self, net: nn.Module, points: Sequence[str], heads: Sequence[nn.Module], reached: Sequence[frozenset[str]]
    ) -> None:
        super().__init__()
        self.net, self.points, self.heads = net, tuple(points), nn.ModuleList(heads)
        self.reached, self.depth, self.every = tuple(reached), len(points) + 1, False

    def forward(self, x: Tensor) -> Tensor:
        features: dict[str, Tensor] = {}
        wanted = self.points[: self.depth]
        hooks = [self.net.get_submodule(p).register_forward_hook(self._make_hook(p, features)) for p in wanted]
        try:
            last = self.net(x)
        except ExitReached as end:
            last = self.heads[self.depth - 1](end.out)
        finally:
            for hook in hooks:
                hook.remove()
        if not self.every:
            return last  # type: ignore[no-any-return]
        early = [head(features[p]) for p, head in zip(self.points[: self.depth - 1], self.heads, strict=False)]
        return torch.cat([*early, last], 1)

    def _make_hook(self, point: str, features: dict[str, Tensor]) -> Any:
        """A forward hook that stores what `point` gave, and ends the pass where that is the deepest exit."""
        deepest = self.points.index(point) == self.depth - 1

        def store(module: nn.Module, args: Any, out: Tensor) -> None:
            features[point] = out
            if deepest:
                raise ExitReached(out)

        return store

    def at_depth(self, depth: int) -> MultiExitNet:
        """The first `depth` exits and the layers they need, sharing this network's tensors."""
        if depth > len(self.points):
            return self
        small = copy.deepcopy(self, {id(t): t for t in [*self.parameters(), *self.buffers()]})
        small.depth = depth
        small.heads = small.heads[:depth]
        for name, module in list(small.net.named_modules()):
            if name and name not in self.reached[depth - 1] and has_parameters(module):
                parent, _, attribute = name.rpartition(".")
                setattr(small.net.get_submodule(parent), attribute, nn.Identity())
        return small

    def names(self, depth: int) -> frozenset[str]:
        """The names of the tensors of the first `depth` exits."""
        return frozenset(self.at_depth(depth).state_dict())


@contextmanager
def all_exits(model: nn.Module, every: bool = True) -> Generator[None, None, None]:
    """Within the block a model with several exits (an attribute `every`) answers with the logits of them all, or without `every`
    of the deepest alone; others as ever."""
    before = getattr(model, "every", None)
    if before is not None:
        model.every = every  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is not None:
            model.every = before


def has_parameters(module: nn.Module) -> bool:
    """Whether `module` itself has parameters, frozen or not, its children left out."""
    return hasattr(module, MARK) or next(module.parameters(recurse=False), None) is not None


@dataclass(frozen=True)
class StageEnd:
    """A module after which an exit may stand: the shape of its output without the batch, and which modules have run by then.

    `channels_last`: channels are the last dim, as in (tokens, channels), not the first, as in (channels, height, width).
    """

    name: str
    shape: tuple[int, ...]
    run: frozenset[str]
    channels_last: bool

    @property
    def channels(self) -> int:
        return self.shape[-1] if self.channels_last else self.shape[0]


def add_exits(model: nn.Module, x: Tensor, classes: int, exits: int, convs: int) -> MultiExitNet:
    """`model` with classifiers after at most `exits - 1` of its stages, spaced evenly; `x` is a batch to find these with.

    Where there are stages enough the last one gets none, for the model's own classifier reads it. `convs`: see `build_head`.
    """
    ends = find_stage_ends(model, x)
    ends = ends[:-2] if len(ends) > exits else ends[:-1]
    points = [ends[i] for i in space_evenly(len(ends), exits - 1)]
    heads = [build_head(end, classes, convs) for end in points]
    return MultiExitNet(model, [end.name for end in points], heads, [end.run for end in points])


def space_evenly(number: int, wanted: int) -> list[int]:
    """`wanted` of the indices 0 … number - 1, as evenly spaced as can be; all, where there are fewer. (7, 3) gives 1, 3, 5."""
    if wanted >= number:
        return list(range(number))
    return [round((i + 1) * (number + 1) / (wanted + 1)) - 1 for i in range(wanted)]


def build_head(end: StageEnd, classes: int, convs: int) -> nn.Module:
    """A classifier of a stage's features: for images `convs` 3x3 convolutions, then the mean over positions and a linear layer."""
    channels, dims = end.channels, range(1, len(end.shape)) if end.channels_last else range(2, len(end.shape) + 1)
    layers: list[nn.Module] = []
    for _ in range(convs if len(end.shape) == 3 and not end.channels_last else 0):
        conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        layers.append(nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU()))
    if len(end.shape) > 1:
        layers.append(MeanOver(list(dims)))
    return nn.Sequential(*layers, nn.Linear(channels, classes))


class MeanOver(nn.Module):
    """The mean over `dims`."""

    def __init__(self, dims: Sequence[int] = (1,)) -> None:
        super().__init__()
        self.dims = list(dims)

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims)


def find_stage_ends(model: nn.Module, x: Tensor) -> list[StageEnd]:
    """The ends of `model`'s stages in order of execution, found by running it on the batch `x`.

    A stage is a run of steps (`run_steps`) with as many channels; where that leaves one stage, every step with parameters of its
    own is one (a transformer's layers).
    """
    if not (steps := run_steps(model, x)):
        raise NotApplicable(
            f"not applicable: no module of this {type(model).__name__} stands between its layers and answers with features, so no "
            "classifier can be put behind one"
        )
    wider = [a for a, b in zip(steps, [*steps[1:], None], strict=True) if b is None or a.channels != b.channels]
    stages = drop_parameterless(model, wider)
    return stages if len(stages) > 2 else drop_parameterless(model, steps)


def drop_parameterless(model: nn.Module, ends: list[StageEnd]) -> list[StageEnd]:
    """`ends` without those before which no further layer with parameters has run."""
    layers = {name for name, m in model.named_modules() if has_parameters(m)}
    known: frozenset[str] = frozenset()
    found = []
    for end in ends:
        if (end.run - known) & layers:
            found.append(end)
            known = end.run
    return found


def run_steps(model: nn.Module, x: Tensor) -> list[StageEnd]:
    """The steps of the network, found by running it on `x`.

    A step is a module that stands, through nothing but containers, directly under `model`, runs once and answers with features
    (a floating-point tensor with a row for each example).
    """
    names = {module: name for name, module in model.named_modules()}
    containers = {name for name, m in model.named_modules() if isinstance(m, nn.Sequential | nn.ModuleList)} | {""}
    started: list[nn.Module] = []
    ended: list[StageEnd] = []

    def start(module: nn.Module, args: Any) -> None:
        started.append(module)

    def end(module: nn.Module, args: Any, out: Any) -> None:
        name = names[module]
        features = isinstance(out, Tensor) and out.ndim > 1 and out.is_floating_point() and len(out) == len(x)
        if features and name not in containers and list_ancestors(name) <= containers:
            ended.append(StageEnd(name, tuple(out.shape[1:]), frozenset(names[m] for m in started), is_channels_last(started)))

    hooks = [m.register_forward_pre_hook(start) for m in names] + [m.register_forward_hook(end) for m in names]
    run_watched(model, x, hooks)
    uncalled = {name for module, name in names.items() if module not in started}  # their tensors are used by the module around them
    once = [step for step in ended if sum(names[module] == step.name for module in started) == 1]
    return [replace(step, run=step.run | {n for n in uncalled if n.rpartition(".")[0] in step.run}) for step in once]


def is_channels_last(started: Sequence[nn.Module]) -> bool:
    """Whether the last layer with parameters among those that ran works on the last dim."""
    layers = [m for m in started if has_parameters(m)]
    return bool(layers) and not isinstance(layers[-1], CHANNELS_FIRST)


def list_ancestors(name: str) -> set[str]:
    """The names of the modules around module `name`: a.b.c gives "", a and a.b."""
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(len(parts))}
