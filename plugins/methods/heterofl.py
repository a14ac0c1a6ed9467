"""HeteroFL (Diao et al., ICLR 2021): the leading channels of every layer (spec heterofl 2)."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetfl import Client, ExtraSpec, Field, Plan, Plugin, ReceivedReply, Reply, Server, Task, Update, hookimpl, prefix
from hetfl.models.normalization import NORMS

WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


class HeteroFL(Plugin):
    """Nested slices; with `mask_loss`, a client neither trains nor contributes the logits of classes it does not hold."""

    extras_up: ClassVar[dict[str, ExtraSpec]] = {"labels": ExtraSpec(1 << 20, torch.bool)}

    scaler: bool = Field(False, description="divide by the width ratio in training, at the input of each norm")
    mask_loss: bool = Field(False, description="cross entropy with the logits of absent classes put to 0")
    static_bn: bool = Field(False, description="batch norm statistics from the clients' passes after aggregation")

    @property
    def norm_policy(self) -> str | None:
        return "static" if self.static_bn else None

    @property
    def inactive_hooks(self) -> tuple[str, ...]:
        return (*(() if self.mask_loss else ("recover",)), *(() if self.mask_loss or self.scaler else ("fit",)))

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        return [server.select(prefix(client.profile.width)) for client in clients]

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        if self.mask_loss:
            task.loss = mask_absent_classes(task.data.held_classes)
        with scale_activations(task.model, width_ratio(task)) if self.scaler else nullcontext():
            reply = yield
        if self.mask_loss:
            reply.extras["labels"] = task.data.held_classes
        return reply

    @hookimpl
    def recover(self, server: Server, replies: Iterable[ReceivedReply]) -> Iterable[Update]:
        return (put_held_rows(server, r) for r in replies)


def mask_absent_classes(labels: Tensor) -> Any:
    """A loss: cross entropy in which the logits of classes outside `labels` (bool, one a class) count as 0 (spec 2.6)."""
    return lambda logits, y: F.cross_entropy(logits.masked_fill(~labels.to(logits.device), 0.0), y)


def width_ratio(task: Task) -> float:
    """The width ratio that the client really has: kept units over all units."""
    return sum(task.plan_sizes.values()) / max(1, sum(task.full_sizes.values()))


@contextmanager
def scale_activations(model: nn.Module, s: float) -> Generator[None, None, None]:
    """In training, x / s at the input of every norm; without norms, at the output of all weighted layers but the last (2.3)."""
    norms = [m for m in model.modules() if isinstance(m, NORMS)]
    layers = [m for m in model.modules() if isinstance(m, WEIGHTED)][:-1]
    if norms:
        hooks = [m.register_forward_pre_hook(lambda m, x: (x[0] / s, *x[1:]) if m.training else None) for m in norms]
    else:
        hooks = [m.register_forward_hook(lambda m, _, out: out / s if m.training else None) for m in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def put_held_rows(server: Server, returned: ReceivedReply) -> Update:
    """The reply put back, the head's rows only for the classes that the client holds (spec 2.5)."""
    labels, patches = returned.reply.extras["labels"], dict(returned.plan.put(returned.reply.state))
    for name in set(find_head(server)) & set(patches):
        patches[name] = patches[name].rows(labels)
    return Update(returned.client.id, patches, float(returned.reply.examples), returned.reply.extras)


def find_head(server: Server) -> list[str]:
    """The tensors whose rows are the classes: the last weight with as many rows as there are classes, and its bias."""
    weights = [name for name, t in server.state.items() if name.endswith("weight") and t.shape[:1] == (server.classes,)]
    last = weights[-1:]
    return [*last, *(b for w in last if (b := w.removesuffix("weight") + "bias") in server.state)]
