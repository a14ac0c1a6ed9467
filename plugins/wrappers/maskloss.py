"""HeteroFL's masked cross entropy (Diao et al., ICLR 2021; spec heterofl 2.5, 2.6): a client leaves alone the classes it lacks."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from hetfl import ExtraSpec, Field, Plugin, Reply, Server, Task, Update, hookimpl


class MaskLoss(Plugin):
    """In training, the logits of classes that a client does not hold are 0; their rows of the head are merged without it."""

    stackable: ClassVar[bool] = True
    tasks = ("classify",)
    tasks_why = "clients lack no classes where an example has not one of them"
    extras_up: ClassVar[dict[str, ExtraSpec]] = {"labels": ExtraSpec(1 << 20, torch.bool, 1)}

    head_rows: bool = Field(True, description="merge a class's row of the head only over the clients that hold the class")

    @property
    def inactive_hooks(self) -> Collection[str]:
        return () if self.head_rows else ("recover",)

    @hookimpl(wrapper=True, trylast=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        held, forward = task.data.held_classes, task.forward
        task.constants["held"] = held
        task.forward = lambda model, x: mask_logits(forward(model, x), task.constants["held"])
        reply = yield
        if self.head_rows:
            reply.extras["labels"] = held
        return reply

    @hookimpl(wrapper=True)
    def recover(self, server: Server) -> Generator[None, Iterable[Update], Iterable[Update]]:
        updates, head = (yield), find_head(server)
        return (keep_held_rows(update, head, server.classes) for update in updates)


def mask_logits(logits: Any, held: Tensor) -> Any:
    """The logits (N, classes) with those of classes outside `held` (bool, one a class) at 0, not minus infinity (spec 2.6).

    Logits of several exits may stand side by side, (N, exits * classes), or in a tuple.
    """
    if isinstance(logits, tuple):
        return tuple(mask_logits(part, held) for part in logits)
    absent = ~held.to(logits.device).repeat(logits.shape[1] // len(held))
    return logits.masked_fill(absent, 0.0)


def keep_held_rows(update: Update, head: Collection[str], classes: int) -> Update:
    """The update without the head's rows of classes that its client does not hold (spec 2.5)."""
    if (held := update.extras.get("labels")) is None:
        raise ValueError("it does not say which classes it holds")
    if len(held) != classes:
        raise ValueError(f"it marks {len(held)} classes, not {classes}")
    return replace(update, patches={n: p.rows(held) if n in head else p for n, p in update.patches.items()})


def find_head(server: Server) -> list[str]:
    """The tensors whose rows are the classes: the last weight with as many rows as there are classes, and its bias."""
    weights = [name for name, t in server.state.items() if name.endswith("weight") and t.shape[:1] == (server.classes,)]
    layers = [name.removesuffix("weight") for name in weights[-1:]]
    return [f"{layer}{kind}" for layer in layers for kind in ("weight", "bias") if f"{layer}{kind}" in server.state]
