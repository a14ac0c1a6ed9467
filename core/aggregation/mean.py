"""The means that aggregations share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from hetfl.aggregation.updates import Update, Updates, by_examples
from hetfl.models.state import State
from hetfl.submodel.blocks import Index, view_blocks
from hetfl.submodel.plan import Patch


def leads(index: Mapping[int, Tensor]) -> bool:
    """Whether a block is a leading part of its tensor along every dim."""
    return (index if isinstance(index, Index) else Index(index)).leads


@dataclass(eq=False)
class Layout:
    """The leading blocks that some clients have in common: their places in the sums, and what these clients count together."""

    blocks: list[tuple[str, Mapping[int, Tensor]]]
    views: list[Tensor]
    weight: float = 0.0


class WeightedSum:
    """sum w c x and sum w c of one tensor, over the patches of clients that come one after the other.

    The sum is kept on the device of the first patch (a GPU, where clients that trained there hand their tensors over without a
    copy), the count in main memory; the mean returns to where `old` is.
    """

    def __init__(self, old: Tensor) -> None:
        self.old, self.total = old, cast(Tensor | None, None)
        self._whole, self._parts = 0.0, torch.zeros([1] * old.ndim)  # the counts of whole tensors, and of blocks of it

    @property
    def count(self) -> Tensor:
        """sum w c; may be broadcastable to the tensor's shape: a dim is 1 where no patch was cut."""
        return self._parts + self._whole

    def add(self, patch: Patch, weight: float) -> None:
        self.cover(patch.index, patch.coverage, weight)
        values = patch.values if patch.coverage is None else patch.values * patch.coverage.to(patch.values.device)
        total = self.open(values.device)
        Index.of(patch.index).add(total, values.to(total.device), weight)

    def cover(self, index: Mapping[int, Tensor], coverage: Tensor | None, weight: float) -> None:
        """Adds to `count` alone."""
        if not index and coverage is None:
            self._whole += weight
            return
        self.widen(index if coverage is None else range(self.old.ndim))
        Index.of(index).add(self._parts, 1.0 if coverage is None else coverage, weight)

    def open(self, device: torch.device) -> Tensor:
        """The sum; before anything was added 0, on `device`."""
        if self.total is None:
            self.total = torch.zeros(self.old.shape, dtype=self.old.dtype, device=device)
        return self.total

    def widen(self, dims: Iterable[int]) -> None:
        """Gives the count its full size along `dims`."""
        wanted = [n if d in dims else now for d, (n, now) in enumerate(zip(self.old.shape, self._parts.shape, strict=True))]
        if list(self._parts.shape) != wanted:
            self._parts = self._parts.expand(wanted).clone()

    def take_over(self, values: Tensor, weight: float) -> bool:
        """Makes the first client's whole tensor the sum and scales it IN PLACE; False where its memory cannot serve."""
        ours = values.is_contiguous() and values.dtype == self.old.dtype and self.total is None
        if not ours or values.untyped_storage().data_ptr() == self.old.untyped_storage().data_ptr():
            return False
        self.total = values if weight == 1 else values.mul_(weight)
        return True

    def mean(self) -> Tensor:
        """Per entry sum w c x / sum w c; the old value where nothing is covered (spec heterofl 2.5)."""
        count = self.count
        if self.total is None:
            return self.old
        whole, count = self._whole > 0 or bool((count > 0).all()), count.to(self.total.device)
        if whole:
            return self.total.div_(count).to(self.old.device)
        divided = (self.total / count.clamp(min=torch.finfo(count.dtype).tiny)).to(self.old.device)
        return torch.where(self.count > 0, divided, self.old)

    def mean_with_absent(self, whole: float) -> Tensor:
        """(sum w c x + (whole - sum w c) old) / whole."""
        count = self.count
        if self.total is None:
            return self.old
        if bool((count == whole).all()):
            return self.total.div_(whole).to(self.old.device)
        return torch.where(count > 0, (self.total.to(self.old.device) + (whole - count) * self.old) / whole, self.old)


class MeanAggregator:
    """The weighted mean over the clients that cover an entry, its old value where none does (spec heterofl 2.5), update by update.

    With `absent`, a client without an entry votes for the entry's old value: sum w (c x + (1 - c) old) / sum w. Integer buffers
    (numbers of batches seen) become the largest that is reported. With `consume`, the first client's tensors become the sums:
    nobody else may need them.
    """

    def __init__(self, old: State, *, absent: bool = False, consume: bool = True) -> None:
        self.old, self.absent, self._consume, self._whole = old, absent, consume, 0.0
        self._sums = {name: WeightedSum(tensor) for name, tensor in old.items() if tensor.is_floating_point()}
        self._counters = {name: tensor for name, tensor in old.items() if not tensor.is_floating_point()}
        self._layouts: dict[tuple[tuple[str, int], ...], Layout] = {}

    def add(self, update: Update, weight: float) -> None:
        """Takes one more update, which counts `weight`."""
        first, self._whole = not self._whole, self._whole + weight
        leading = [(n, p) for n, p in update.patches.items() if n in self._sums and p.coverage is None and leads(p.index)]
        led = {name for name, _ in leading}
        apart = {name: patch for name, patch in update.patches.items() if name not in led}
        free = [(n, p) for n, p in leading if not p.index] if first and self._consume else []
        taken_over = {n for n, p in free if self._sums[n].take_over(p.values, weight)}
        layout = self._layout(leading)
        layout.weight += weight
        pairs = [(view, p.values) for view, (n, p) in zip(layout.views, leading, strict=True) if n not in taken_over]
        if pairs:
            sums, values = [view for view, _ in pairs], [values.to(view.device) for view, values in pairs]
            torch._foreach_add_(sums, values, alpha=weight)
        for name, patch in apart.items():
            if name in self._counters:
                self._counters[name] = torch.maximum(self._counters[name], patch.values.to(self._counters[name].device))
            elif name in self._sums:
                self._sums[name].add(patch, weight)

    def _layout(self, patches: Sequence[tuple[str, Patch]]) -> Layout:
        """Where the leading blocks `patches` lie, found once for all clients that have the same."""
        key = tuple([(name, id(p.index)) for name, p in patches])
        if key not in self._layouts:
            totals = [self._sums[name].open(patch.values.device) for name, patch in patches]
            views = view_blocks(totals, [p.index for _, p in patches])
            self._layouts[key] = Layout([(name, p.index) for name, p in patches], views)
        return self._layouts[key]

    def state(self) -> State:
        """The mean of what was added; to be asked once."""
        for layout in self._layouts.values():
            for name, index in layout.blocks:
                self._sums[name].cover(index, None, layout.weight)
        found = {name: s.mean_with_absent(self._whole) if self.absent else s.mean() for name, s in self._sums.items()}
        return {name: found[name] if name in found else self._counters[name] for name in self.old}


def running_mean(
    old: State, updates: Iterable[Update], weight: Callable[[Update], float] = by_examples, *, absent: bool = False
) -> State:
    """The mean over the covering clients, each update dropped once it is added, so that a round of any size needs little memory.

    `weight` says what a client counts (`WEIGHTINGS`). The updates' tensors must not be used again. `absent` as in MeanAggregator.
    """
    total = MeanAggregator(old, absent=absent)
    for update in updates:
        total.add(update, weight(update))
    return total.state()


def mean(updates: Updates, weights: Sequence[float]) -> State:
    """Per entry, the weighted mean over the clients that cover it; the old value where none does (spec heterofl 2.5)."""
    return _add_all(MeanAggregator(updates.old, consume=False), updates, weights)


def mean_with_absent(updates: Updates, weights: Sequence[float]) -> State:
    """sum w (c x + (1 - c) old) / sum w: a client without an entry votes for its old value."""
    return _add_all(MeanAggregator(updates.old, absent=True, consume=False), updates, weights)


def _add_all(total: MeanAggregator, updates: Updates, weights: Sequence[float]) -> State:
    for update, weight in zip(updates, weights, strict=True):
        total.add(update, weight)
    return total.state()
