"""What the clients of a round taught the server, and the means that aggregations share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor

from hetfl.core.blocks import Index, cells
from hetfl.core.plans import Patch, Patches
from hetfl.core.widths import State


@dataclass(frozen=True, eq=False)
class Update:
    """What one client taught the server, in global coordinates whatever it trained; `weight` is its number of examples."""

    client: int
    patches: Patches
    weight: float
    extras: State = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Merged:
    """The next global model, and further models of the server by name: a cluster's or a client's own, as patches of the global.

    `facts` are numbers for the round's row.
    """

    state: State
    branches: Mapping[str, Patches] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)


class Updates(Sequence[Update]):
    """The updates of a round in client-id order, over the global state `old` that they were taken from."""

    def __init__(self, updates: Sequence[Update], old: State) -> None:
        self._updates = sorted(updates, key=lambda u: u.client)
        self.old = old

    def __len__(self) -> int:
        return len(self._updates)

    def __iter__(self) -> Iterator[Update]:
        return iter(self._updates)

    def __getitem__(self, place):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN204
        return self._updates[place]

    @property
    def weights(self) -> list[float]:
        """Each client's number of examples."""
        return [u.weight for u in self]

    def votes(self, weighting: str) -> list[float]:
        """What each client counts: its examples under "samples", one vote under "uniform"."""
        return [VOTES[weighting](u) for u in self]

    def cover(self, name: str, weights: Sequence[float]) -> Tensor:
        """sum w c over the clients for one tensor; may be broadcastable to its shape."""
        total = Sum(self.old[name])
        for patch, weight in self._held(name, weights):
            total.cover(patch.index, patch.coverage, weight)
        return total.count

    def _held(self, name: str, weights: Sequence[float]) -> list[tuple[Patch, float]]:
        return [(u.patches[name], weight) for u, weight in zip(self, weights, strict=True) if name in u.patches]

    def column(self, name: str) -> tuple[Tensor, Tensor]:
        """One tensor of all clients at full size: values and coverage, both (clients, *shape)."""
        old = self.old[name]
        absent = (old, torch.zeros(old.shape))
        values, coverage = zip(*(u.patches[name].full(old) if name in u.patches else absent for u in self), strict=True)
        return torch.stack(values), torch.stack(coverage)

    def averaged(self) -> list[str]:
        """Names of the tensors that have means; integer buffers are counted, not averaged."""
        return [name for name, tensor in self.old.items() if tensor.is_floating_point()]

    def counters(self) -> State:
        """Integer buffers (numbers of batches seen): the largest that any client reports."""
        names = [name for name, tensor in self.old.items() if not tensor.is_floating_point()]
        held = {name: [u.patches[name].values for u in self if name in u.patches] for name in names}
        return {name: torch.stack([self.old[name], *values]).amax(0) for name, values in held.items()}

    def among(self, chosen: Callable[[Update], bool], old: State | None = None) -> Updates:
        """The updates that are `chosen`, over `old` in place of the global state."""
        return Updates([u for u in self if chosen(u)], self.old if old is None else old)


class Sum:
    """sum w c x and sum w c of one tensor, over the patches of clients that come one after the other."""

    def __init__(self, old: Tensor) -> None:
        self.old, self.total = old, cast(Tensor | None, None)
        self._whole, self._parts = 0.0, torch.zeros([1] * old.ndim)  # the counts of whole tensors, and of blocks of it

    @property
    def count(self) -> Tensor:
        """sum w c; may be broadcastable to the tensor's shape: a dim is 1 where no patch was cut."""
        return self._parts + self._whole

    def add(self, patch: Patch, weight: float) -> None:
        self.cover(patch.index, patch.coverage, weight)
        values = patch.values if patch.coverage is None else patch.values * patch.coverage
        Index.of(patch.index).add(self.opened(), values, weight)

    def cover(self, index: Mapping[int, Tensor], coverage: Tensor | None, weight: float) -> None:
        """Adds to `count` alone."""
        if not index and coverage is None:
            self._whole += weight
            return
        self.widen(index if coverage is None else range(self.old.ndim))
        Index.of(index).add(self._parts, 1.0 if coverage is None else coverage, weight)

    def opened(self) -> Tensor:
        """The sum, 0 before anything was added."""
        if self.total is None:
            self.total = torch.zeros(self.old.shape, dtype=self.old.dtype)
        return self.total

    def widen(self, dims: Iterable[int]) -> None:
        """Gives the count its full size along `dims`."""
        wanted = [n if d in dims else now for d, (n, now) in enumerate(zip(self.old.shape, self._parts.shape, strict=True))]
        if list(self._parts.shape) != wanted:
            self._parts = self._parts.expand(wanted).clone()

    def adopt(self, values: Tensor, weight: float) -> bool:
        """Makes the first client's whole tensor, which nobody needs any more, the sum itself; False where that cannot be."""
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
        if self._whole > 0 or bool((count > 0).all()):
            return self.total.div_(count)
        return torch.where(count > 0, self.total / count.clamp(min=torch.finfo(count.dtype).tiny), self.old)

    def blend(self, whole: float) -> Tensor:
        """(sum w c x + (whole - sum w c) old) / whole."""
        count = self.count
        if self.total is None:
            return self.old
        if bool((count == whole).all()):
            return self.total.div_(whole)
        return torch.where(count > 0, (self.total + (whole - count) * self.old) / whole, self.old)


class Fold(Protocol):
    """An aggregation that takes the updates of a round one by one, in client-id order, and need not hold them."""

    def add(self, update: Update) -> None:
        """Takes one more; the memory of its tensors is now the fold's."""

    def result(self) -> Merged:
        """What the updates come to; asked once."""


def samples(update: Update) -> float:
    """A client counts its examples."""
    return update.weight


def uniform(update: Update) -> float:
    """A client counts 1."""
    return 1.0


VOTES = {"samples": samples, "uniform": uniform}


@dataclass(eq=False)
class Layout:
    """The leading blocks that some clients have in common: their places in the sums, and what these clients count together."""

    blocks: list[tuple[str, Mapping[int, Tensor]]]
    views: list[Tensor]
    weight: float = 0.0


class Mean:
    """The weighted mean over the clients that cover an entry, its old value where none does (spec heterofl 2.5), as a Fold.

    `vote` says what a client counts. With `absent`, a client without an entry votes for the entry's old value:
    sum w (c x + (1 - c) old) / sum w. Integer buffers (numbers of batches seen) become the largest that is reported. With
    `consume`, the first client's tensors become the sums.
    """

    def __init__(
        self, old: State, vote: Callable[[Update], float] = samples, *, absent: bool = False, consume: bool = True
    ) -> None:
        self.old, self.absent, self._vote, self._consume, self._whole = old, absent, vote, consume, 0.0
        self._sums = {name: Sum(tensor) for name, tensor in old.items() if tensor.is_floating_point()}
        self._counters = {name: tensor for name, tensor in old.items() if not tensor.is_floating_point()}
        self._layouts: dict[tuple[tuple[str, int], ...], Layout] = {}

    def add(self, update: Update) -> None:
        self.weigh(update, self._vote(update))

    def weigh(self, update: Update, weight: float) -> None:
        """Takes one more update, which counts `weight`."""
        first, self._whole = not self._whole, self._whole + weight
        leading = [(n, p) for n, p in update.patches.items() if n in self._sums and p.coverage is None and Index.of(p.index).leads]
        led = {name for name, _ in leading}
        apart = {name: patch for name, patch in update.patches.items() if name not in led}
        adopted = {n for n, p in leading if first and self._consume and not p.index and self._sums[n].adopt(p.values, weight)}
        layout = self._layout(leading)
        layout.weight += weight
        pairs = [(view, p.values) for view, (n, p) in zip(layout.views, leading, strict=True) if n not in adopted]
        if pairs:
            torch._foreach_add_(*map(list, zip(*pairs, strict=True)), alpha=weight)
        for name, patch in apart.items():
            if name in self._counters:
                self._counters[name] = torch.maximum(self._counters[name], patch.values)
            elif name in self._sums:
                self._sums[name].add(patch, weight)

    def _layout(self, patches: Sequence[tuple[str, Patch]]) -> Layout:
        """Where the leading blocks `patches` lie, found once for all clients that have the same."""
        key = tuple([(name, id(p.index)) for name, p in patches])
        if key not in self._layouts:
            totals = [self._sums[name].opened() for name, _ in patches]
            views = [total[cells(p.index, total)] for total, (_, p) in zip(totals, patches, strict=True)]
            self._layouts[key] = Layout([(name, p.index) for name, p in patches], views)
        return self._layouts[key]

    def result(self) -> Merged:
        return Merged(self.state())

    def state(self) -> State:
        """The mean of what was added; to be asked once."""
        for layout in self._layouts.values():
            for name, index in layout.blocks:
                self._sums[name].cover(index, None, layout.weight)
        found = {name: s.blend(self._whole) if self.absent else s.mean() for name, s in self._sums.items()}
        return {name: found[name] if name in found else self._counters[name] for name in self.old}


def gather(fold: Fold, updates: Updates) -> Merged:
    """What a Fold makes of updates that are all there."""
    for update in updates:
        fold.add(update)
    return fold.result()


def mean(updates: Updates, weights: Sequence[float]) -> State:
    """Per entry, the weighted mean over the clients that cover it; the old value where none does (spec heterofl 2.5)."""
    return _weighed(Mean(updates.old, consume=False), updates, weights)


def blend(updates: Updates, weights: Sequence[float]) -> State:
    """sum w (c x + (1 - c) old) / sum w: a client without an entry votes for its old value."""
    return _weighed(Mean(updates.old, absent=True, consume=False), updates, weights)


def _weighed(whole: Mean, updates: Updates, weights: Sequence[float]) -> State:
    for update, weight in zip(updates, weights, strict=True):
        whole.weigh(update, weight)
    return whole.state()
