"""What the clients of a round taught the server, in global coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from hetfl.models.state import State
from hetfl.submodel.blocks import Index
from hetfl.submodel.plan import Patch, Patches


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

    def __init__(self, updates: Iterable[Update], old: State) -> None:
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
        return [WEIGHTINGS[weighting](u) for u in self]

    def cover(self, name: str, weights: Sequence[float]) -> Tensor:
        """sum w c over the clients for one tensor; may be broadcastable to its shape."""
        total = WeightedSum(self.old[name])
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


class WeightedSum:
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


def by_examples(update: Update) -> float:
    """A client counts its examples."""
    return update.weight


def by_client(update: Update) -> float:
    """A client counts 1."""
    return 1.0


WEIGHTINGS = {"samples": by_examples, "uniform": by_client}
