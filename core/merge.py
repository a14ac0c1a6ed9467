"""What the clients of a round taught the server, and the means that aggregations share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hetfl.core.plans import Patch, Patches
from hetfl.core.widths import State, cells


@dataclass(frozen=True, eq=False)
class Update:
    """What one client taught the server, in global coordinates whatever it trained; `weight` is its number of examples."""

    client: int
    patches: Patches
    weight: float
    extras: State = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Merged:
    """The next global model, and further models of the server by name: a cluster's or a client's own, as patches of the global."""

    state: State
    branches: Mapping[str, Patches] = field(default_factory=dict)


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
        return self.weights if weighting == "samples" else [1.0] * len(self)

    def sums(self, name: str, weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """(sum w c x, sum w c) over the clients for one tensor; the second may be broadcastable to the first's shape."""
        total = torch.zeros_like(self.old[name])
        for patch, weight in self._held(name, weights):
            add(total, patch.values if patch.coverage is None else patch.values * patch.coverage, patch, weight)
        return total, self.cover(name, weights)

    def cover(self, name: str, weights: Sequence[float]) -> Tensor:
        """sum w c over the clients for one tensor; may be broadcastable to its shape."""
        held = self._held(name, weights)
        count = torch.zeros(extent(self.old[name], [patch for patch, _ in held]))
        for patch, weight in held:
            add(count, torch.ones(()) if patch.coverage is None else patch.coverage, patch, weight)
        return count

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


def extent(old: Tensor, patches: Sequence[Patch]) -> list[int]:
    """The shape that tells all counts apart: 1 along dims that no patch cuts."""
    cut = {d for p in patches for d in p.index}
    dense = any(p.coverage is not None for p in patches)
    return [n if dense or d in cut else 1 for d, n in enumerate(old.shape)]


def add(total: Tensor, values: Tensor, patch: Patch, weight: float) -> None:
    """total[block of patch] += weight * values, in place; dims of size 1 in `total` stand for all positions."""
    index = {d: where for d, where in patch.index.items() if total.shape[d] > 1 or len(where) < 2}
    where = cells(index, total)
    if all(isinstance(w, slice) for w in where):
        total[where].add_(values.to(total), alpha=weight)
    else:
        total[where] += values.to(total) * weight


def mean(updates: Updates, weights: Sequence[float]) -> State:
    """Per entry, the weighted mean over the clients that cover it; the old value where none does (spec heterofl 2.5)."""
    state = updates.counters()
    for name in updates.averaged():
        total, count = updates.sums(name, weights)
        state[name] = torch.where(count > 0, total / count.clamp(min=torch.finfo(count.dtype).tiny), updates.old[name])
    return ordered(state, updates.old)


def blend(updates: Updates, weights: Sequence[float]) -> State:
    """sum w (c x + (1 - c) old) / sum w: a client without an entry votes for its old value."""
    state, whole = updates.counters(), float(sum(weights))
    for name in updates.averaged():
        total, count = updates.sums(name, weights)
        state[name] = torch.where(count > 0, (total + (whole - count) * updates.old[name]) / whole, updates.old[name])
    return ordered(state, updates.old)


def ordered(state: State, like: State) -> State:
    return {name: state[name] for name in like}
