"""The depth of a submodel: how many exits it has, and which residual blocks it leaves out, in its sizes and in its module."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

EXITS = "depth"  # among the sizes of a submodel: how many exits it has, where the model has several
BLOCK = "block "  # what a block's name follows there; 0: the submodel leaves it out


@dataclass(frozen=True)
class Depth:
    """`exits`: how many, where the model has several (None: all); `skipped`: the blocks left out, in order of execution."""

    exits: int | None = None
    skipped: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """What it adds to the sizes of a submodel."""
        exits = {} if self.exits is None else {EXITS: self.exits}
        return exits | {BLOCK + name: 0 for name in self.skipped}

    def cut(self, model: nn.Module) -> nn.Module:
        """`model` without the layers that this depth leaves out, sharing the tensors of the others; itself where it has all."""
        if self.exits is not None:
            model = model.at_depth(self.exits)  # type: ignore[operator]
        return skip_blocks(model, self.skipped) if self.skipped else model

    def select_names(self, model: nn.Module, names: Collection[str]) -> frozenset[str] | None:
        """Those of `names`, the tensors of `model`, that are left; None where all are."""
        if self == Depth():
            return None
        reached = names if self.exits is None else model.names(self.exits)  # type: ignore[operator]
        return frozenset(n for n in names if n in reached and not any(n.startswith(f"{block}.") for block in self.skipped))


def split_sizes(sizes: Mapping[str, int]) -> tuple[dict[str, int], Depth]:
    """The sizes of a submodel: the units of its width groups, and its depth."""
    skipped = tuple(name.removeprefix(BLOCK) for name in sizes if name.startswith(BLOCK))
    groups = {name: size for name, size in sizes.items() if name != EXITS and not name.startswith(BLOCK)}
    return groups, Depth(sizes.get(EXITS), skipped)


class Skipped(nn.Module):
    """Stands where a residual block was left out: the first argument, as if the block had added nothing to it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x


def skip_blocks(model: nn.Module, blocks: Sequence[str]) -> nn.Module:
    """A copy of `model` without the modules named `blocks`, sharing the tensors of the others.

    A block that this model does not have, for it ends before, is left out already.
    """
    small = copy.deepcopy(model, {id(t): t for t in [*model.parameters(), *model.buffers()]})
    for block in set(blocks) & {name for name, _ in model.named_modules()}:
        parent, _, attribute = block.rpartition(".")
        setattr(small.get_submodule(parent), attribute, Skipped())
    return small
