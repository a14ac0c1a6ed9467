"""FjORD (Horvath et al., NeurIPS 2021): ordered dropout of channels while a client trains.

No spec page covers it; this is the published idea as we know it, without its source at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from hetfl import Client, Field, Plan, Plugin, Reply, Server, Task, hookimpl, prefix, unit_count

Logits = tuple[Tensor, Tensor]

Compare = Callable[[Tensor, Tensor], Tensor]


class FjORD(Plugin):
    """The leading channels; each training batch runs a random narrower prefix of them, so that units are ordered by importance."""

    plans_by_width: ClassVar[bool] = True

    ratios: tuple[float, ...] = Field((0.25, 0.5, 0.75, 1.0), description="widths that a batch may run, up to the client's own")
    distill: bool = Field(False, description="teach the narrower model with the client's widest one, which then trains too")

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        return [server.select(prefix(client.profile.width)) for client in clients]

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        runs = [task.make_part({name: torch.arange(n) for name, n in sizes.items()}) for sizes in self._prefix_sizes(task)]
        generator = task.stream("fjord")

        def forward(model: nn.Module, x: Tensor) -> Tensor | Logits:
            narrow = runs[int(torch.randint(len(runs), (1,), generator=generator))](x)
            return (model(x), narrow) if self.distill else narrow

        task.forward = forward
        if self.distill:
            task.loss = partial(distill, task.loss, task.kind.divergence)
        return (yield)

    def _prefix_sizes(self, task: Task) -> list[dict[str, int]]:
        """Sizes of the prefixes that fit the client's submodel, its own among them."""
        sizes = [{name: unit_count(size, ratio) for name, size in task.full_sizes.items()} for ratio in self.ratios]
        fitting = [s for s in sizes if all(s[name] <= task.plan_sizes[name] for name in s) and s != task.plan_sizes]
        return [*fitting, task.plan_sizes]


def distill(supervise: Compare, diverge: Compare, logits: Logits, y: Tensor) -> Tensor:
    """The loss of the widest and of the narrower model, and the divergence of the latter from the former."""
    wide, narrow = logits
    return supervise(wide, y) + supervise(narrow, y) + diverge(narrow, wide.detach())
