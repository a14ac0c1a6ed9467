"""Models with several exits: the heads that answer early, and the part of a model that an exit needs."""

from __future__ import annotations

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]


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


def points(model: nn.Module, x: Tensor) -> list[tuple[str, Shape, frozenset[str]]]:
    """The ends of `model`'s stages in order of execution: (module, shape of its output, modules run by then).

    A stage is a run of modules whose outputs have the same shape beyond the batch; it ends where the shape changes. Modules that
    run more than once, or whose output is no tensor of features (N, C, ...), are no ends.
    """
    started: list[str] = []
    ended: list[tuple[str, Shape, frozenset[str]]] = []
    names = {module: name for name, module in model.named_modules()}

    def before(module: nn.Module, args: Any) -> None:
        started.append(names[module])

    def after(module: nn.Module, args: Any, out: Any) -> None:
        if names[module] and isinstance(out, Tensor) and out.ndim > 2:
            ended.append((names[module], tuple(out.shape[1:]), frozenset(started)))

    hooks = [m.register_forward_pre_hook(before) for m in names] + [m.register_forward_hook(after) for m in names]
    try:
        with torch.no_grad():
            model.eval()(x)
    finally:
        for hook in hooks:
            hook.remove()
    once = [e for e in ended if started.count(e[0]) == 1]
    silent = {name for name in names.values() if name not in started}
    stages = [a for a, b in zip(once, [*once[1:], None], strict=True) if b is None or a[1] != b[1]]
    return [(name, shape, with_silent(run, silent)) for name, shape, run in stages]


def with_silent(run: frozenset[str], silent: set[str]) -> frozenset[str]:
    """Modules that are never called have their tensors used by the module around them."""
    return run | {name for name in silent if name.rpartition(".")[0] in run}
