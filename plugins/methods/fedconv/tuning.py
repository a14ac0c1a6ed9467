"""Training of compressors and dilators on the server's data, the models that they transform held fixed (spec fedconv 2.5, 2.9)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hetfl import Selection, Server, State
from hetfl.plugins.methods.fedconv.compression import Compressor
from hetfl.plugins.methods.fedconv.dilation import dilate, dilate_coverage
from hetfl.plugins.methods.fedconv.filters import Filters
from hetfl.plugins.methods.fedconv.options import FedConvOptions
from hetfl.training.tuning import halve_rate
from hetfl.training.vectorized import find_stacking_error, is_worthwhile

TOGETHER = 16  # dilators that are trained as one batch

Goals = tuple[Tensor, Tensor]  # for the tune and the hold-out examples: logits (N, classes), or labels (N,)


def make_global_goals(options: FedConvOptions, server: Server) -> Goals:
    """What submodels are to answer: as the global model does, or the labels."""
    x, y = (torch.cat(parts) for parts in zip(server.public.tune.all(), server.public.holdout.all(), strict=True))
    if options.objective == "distill":
        parts = x.split(server.options.eval_batch_size)
        y = torch.cat(server.pool.map(lambda part: server.predict(server.state, part), parts))
    return y[: len(server.public.tune)], y[len(server.public.tune) :]


def train_compressor(options: FedConvOptions, server: Server, filters: Filters, goals: Goals, level: str, round: int) -> None:
    """Trains the filters of size class `level` so that f(x; compress(G)) meets the goals, the global model G fixed."""
    was_active, filters.active = filters.active, True
    compress = Compressor(filters, server.state, options.mlr, options.residual)
    x, held_x, (goal, held_goal) = server.public.tune.all()[0], server.public.holdout.all()[0], goals

    def loss(x: Tensor, goal: Tensor) -> Tensor:
        return options.loss(server.kind, server.logits(compress(), x, filters.selection.sizes), goal)

    tuned = server.tune(
        [filters.flat.requires_grad_()], lambda rows: loss(x[rows], goal[rows]), lambda: float(loss(held_x, held_goal)),
        f"compressor {level}", round, steps=options.count_compressor_steps(server, round),
        lr=halve_rate(options.lr, round, options.halve_every), batch=options.batch_size, patience=options.patience,
    )  # fmt: skip
    filters.active = was_active or tuned.step > 0


@dataclass(frozen=True, eq=False)
class Upload:
    """What a client trained on the submodel `selection`, with its dilator; `sent`: what its update is taken from, None where its
    weights are dilated."""

    client: int
    selection: Selection
    dilator: Filters
    trained: State
    sent: State | None

    @property
    def change(self) -> State:
        """What is dilated: the weights, or the update; integer buffers (numbers of batches seen) as they are."""
        if self.sent is None:
            return self.trained
        return {n: t - self.sent[n] if t.is_floating_point() else t for n, t in self.trained.items()}


def group_uploads(options: FedConvOptions, server: Server, uploads: Sequence[Upload]) -> list[list[Upload]]:
    """Uploads whose dilators are trained as one batch: of one size class, where the model is small enough for it to pay."""
    x = server.public.tune.all()[0][:2]
    model, positions = server.builder.build(), options.batch_size * math.prod(x.shape[2:])
    pays = is_worthwhile(model, sum(p.numel() for p in model.parameters()), positions) and not find_stacking_error(model, x.cpu())
    of_class: dict[Selection, list[Upload]] = {}
    for upload in uploads:
        of_class.setdefault(upload.selection, []).append(upload)
    most = TOGETHER if pays else 1
    return [members[i : i + most] for members in of_class.values() for i in range(0, len(members), most)]


def train_dilators(options: FedConvOptions, server: Server, uploads: Sequence[Upload], steps: int, round: int) -> None:
    """Trains the dilators of clients of one size class, their weights fixed; step 0 is among the choices.

    Each client's f(x; dilate(C_k)) is to meet the answers of its own small model, or the labels. Tensors of all clients are joined
    along a leading dim (clients, …).
    """
    clients = [u.client for u in uploads]
    flat = torch.stack([u.dilator.flat.detach() for u in uploads]).requires_grad_()
    each = [u.change for u in uploads]
    changes = {name: torch.stack([change[name] for change in each]) for name in each[0]}
    goals = [make_client_goals(options, server, u) for u in uploads]
    goal, held_goal = (torch.stack(parts) for parts in zip(*goals, strict=True))
    (x, _), (held_x, _) = server.public.tune.all(), server.public.holdout.all()
    model, dilator = server.builder.module().eval(), uploads[0].dilator

    def loss_of_one(weights: Tensor, change: State, x: Tensor, goal: Tensor) -> Tensor:
        large = dilate_model(options, server.state, dilator, change, weights)
        out = torch.func.functional_call(model, {n: t.to(x.device) for n, t in large.items()}, (x,))
        return options.loss(server.kind, out, goal)

    def losses(x: Tensor, goal: Tensor) -> Tensor:
        if len(uploads) == 1:
            large = dilate_model(options, server.state, dilator, {n: t[0] for n, t in changes.items()}, flat[0])
            return options.loss(server.kind, server.logits(large, x[0]), goal[0])[None]
        return torch.func.vmap(loss_of_one)(flat, changes, x, goal)

    numbers, held_x = torch.arange(len(uploads))[:, None], held_x.expand(len(uploads), *held_x.shape)
    tuned = server.tune_together(
        [flat], lambda rows: losses(x[rows], goal[numbers, rows]).sum(), lambda: losses(held_x, held_goal),
        "dilator", round, clients, steps=steps, lr=halve_rate(options.dilator_lr, round, options.halve_every),
        batch=options.batch_size, patience=options.patience,
    )  # fmt: skip
    for upload, weights, result in zip(uploads, flat.detach(), tuned, strict=True):
        upload.dilator.flat = weights.clone()
        upload.dilator.active = upload.dilator.active or result.step > 0


def make_client_goals(options: FedConvOptions, server: Server, upload: Upload) -> Goals:
    """What a dilated model is to answer: as the client's own small model does, or the labels."""
    (x, y), (held_x, held_y) = server.public.tune.all(), server.public.holdout.all()
    if options.objective == "ce":
        return y, held_y
    sizes = upload.selection.sizes
    return server.predict(upload.trained, x, sizes), server.predict(upload.trained, held_x, sizes)


def dilate_model(options: FedConvOptions, state: State, dilator: Filters, change: Mapping[str, Tensor], flat: Tensor) -> State:
    """The dilated model of one client under the filters' weights `flat`: its dilated weights, or the global model `state` plus its
    dilated update U over the coverage M (at least 1)."""
    if options.dilate == "weights":
        return {**state, **dilate(dilator, dict(change), state, options.mlr, options.residual, flat)}
    cover = dilate_coverage(dilator, state, flat)
    grown = dilate(dilator, dict(change), state, flat=flat)
    return {**state, **{n: state[n] + u / cover[n].clamp(min=1) for n, u in grown.items()}}
