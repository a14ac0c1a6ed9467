"""What the clients of a round taught the server, in global coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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
        """sum w c over the clients, in the shape of one tensor."""
        count = torch.zeros(self.old[name].shape)
        for patch, weight in self._held(name, weights):
            Index.of(patch.index).add(count, 1.0 if patch.coverage is None else patch.coverage, weight)
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


def by_examples(update: Update) -> float:
    """A client counts its examples."""
    return update.weight


def by_client(update: Update) -> float:
    """A client counts 1."""
    return 1.0


WEIGHTINGS = {"samples": by_examples, "uniform": by_client}
