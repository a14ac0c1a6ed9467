"""FedConv (Shen et al., MobiSys 2024): convolutional compression learned on the model, transposed-convolution dilation.

The default is the combination that trains stably with a small server set (docs/strategies/fedconv.md); the presets `paper` and
`reference` are the literal readings of spec fedconv 7.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import PrivateAttr, model_validator
from torch import Tensor
from torch.nn import functional as F

from hetfl import Client, Field, Patch, Plan, Plugin, ReceivedReply, Selection, Server, State, Update, hookimpl, prefix
from hetfl.plugins.methods.fedconv.filters import Compressor, Filters, coverage, dilate, tiled
from hetfl.submodel.widths import Kept
from hetfl.training import vectorized
from hetfl.training.local import kl_divergence

LATE = 6

TOGETHER = 16  # dilators that are tuned as one batch

Goals = tuple[Tensor, Tensor]  # logits, or labels, for the tune and the hold-out examples


@dataclass(frozen=True, eq=False)
class Compressed:
    """The plan of a size class: its filters applied to the global state; updates belong to the leading channels."""

    selection: Selection
    filters: Filters
    times: int
    residual: str
    model: str | None = None
    masks: State = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        return self.selection.sizes

    def take(self, state: State) -> State:
        return {name: tensor.detach() for name, tensor in Compressor(self.filters, state, self.times, self.residual)().items()}

    def put(self, trained: State) -> Mapping[str, Patch]:
        return self.selection.put(trained)

    def narrow(self, kept: Kept, masks: State) -> Selection:
        """What remains is no longer a transform of the whole: a plain part of the leading slice."""
        return self.selection.narrow(kept, masks)


class FedConv(Plugin):
    """One set of filters a size class compresses the global model; one a client grows what comes back."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "paper": {"start": "random", "objective": "ce", "residual": "taps", "mlr": 1, "epochs": 20, "late_epochs": 10,
                  "lr": 1e-3, "batch_size": 32, "dilate": "weights", "dilator_epochs": 20, "dilator_lr": 1e-3},
        "reference": {"start": "random", "objective": "ce", "residual": "taps", "mlr": 2, "epochs": 20, "late_epochs": 10,
                      "lr": 1e-3, "batch_size": 32, "halve_every": 25, "dilate": "weights", "dilator_epochs": 20,
                      "dilator_lr": 1e-3, "upload_epochs": 10},
    }  # fmt: skip

    DEVIATES: ClassVar[tuple[tuple[str, str, str, str], ...]] = (
        (
            "filter start",
            "the leading slice (one weight 1)",
            "random",
            "random filters are a constant function; few steps on few images do not get out of it",
        ),
        (
            "activation on weights",
            "none",
            "modified leaky ReLU, twice in the code",
            "a positive mix of non-negative tensors can never be negative",
        ),
        (
            "compressor objective",
            "distillation from the global model, T = 2",
            "cross entropy",
            "54 labelled images are overfitted; distillation needs no labels",
        ),
        (
            "what is dilated",
            "the client's change, with coverage",
            "the weights",
            "refitting weights to the server set overwrites what clients learned",
        ),
        (
            "dilators",
            "placement (`fedconv.dilator_steps=0`); trainable, best step by hold-out, step 0 included",
            "trained every round",
            "no gain was seen, and it is the largest server cost",
        ),
        (
            "selection",
            "lowest hold-out loss of every 10th step",
            "test accuracy in the code",
            "the test split never chooses anything",
        ),
        (
            "end of tuning",
            "after 5 looks at the hold-out without gain (`fedconv.patience=0`: never), presets too",
            "a fixed number of epochs",
            "the best step by the hold-out is kept either way; the summary says what was saved",
        ),
    )

    preset: Literal["default", "paper", "reference"] = Field("default", description="what the other options start from")
    start: Literal["slice", "random"] = Field("slice", description="filters start as the leading slice, or at random")
    objective: Literal["distill", "ce"] = Field("distill", description="distil the global model, or fit the labels")
    temperature: float = Field(2.0, gt=0, description="temperature of distillation")
    residual: Literal["all", "taps"] = Field("all", description="keep the image beside its projection: always, or for convolutions")
    mlr: int = Field(0, ge=0, le=2, description="times the modified leaky ReLU is put on the result")
    steps: int = Field(20, ge=0, description="compressor steps a round")
    first_steps: int | None = Field(60, ge=0, description="compressor steps in round 1 (none: as in every round)")
    epochs: int | None = Field(None, ge=0, description="compressor epochs a round over the server's data, in place of steps")
    late_epochs: int | None = Field(None, ge=0, description="epochs of compressor and dilator from round 6 on")
    lr: float = Field(1e-2, gt=0, description="Adam learning rate of the compressor")
    batch_size: int = Field(64, ge=1, description="server examples in a tuning step")
    patience: int = Field(5, ge=0, description="end tuning after so many looks at the hold-out without gain (0: never)")
    halve_every: int = Field(0, ge=0, description="halve both learning rates every N rounds while above 1e-4 (0: never)")
    dilate: Literal["update", "weights"] = Field("update", description="grow what the client changed, or its weights")
    dilator_steps: int = Field(0, ge=0, description="dilator steps a round for each client (0: placement)")
    dilator_epochs: int | None = Field(None, ge=0, description="dilator epochs a round, in place of steps")
    dilator_lr: float = Field(2e-3, gt=0, description="Adam learning rate of the dilators")
    upload_epochs: int = Field(0, ge=0, description="epochs of fine-tuning each upload on server data, Adam 1e-4")
    _compressors: dict[str, Filters] = PrivateAttr(default_factory=dict)
    _dilators: dict[int, Filters] = PrivateAttr(default_factory=dict)
    _saved: State = PrivateAttr(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        return {**cls.PRESETS.get(given.get("preset", "default"), {}), **given} if isinstance(given, dict) else given

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client], round: int) -> list[Plan]:
        """Tunes the filters of every size class of the round, the classes side by side (spec 2.5)."""
        widths = sorted({c.profile.width for c in clients}, reverse=True)
        goals = self._goals(server) if self._steps(server, round) and min(widths) < 1 else None
        plans = server.pool.map(lambda width: self._plan(server, width, goals, round), widths)
        by_width = dict(zip(widths, plans, strict=True))
        return [by_width[c.profile.width] for c in clients]

    @hookimpl
    def recover(self, server: Server, replies: Iterable[ReceivedReply], round: int) -> Iterable[Update]:
        """Grows every reply to the global model's size with the client's own dilator (spec 2.2, findings 6.5)."""
        replies = list(replies)
        uploads = server.pool.map(lambda r: self._uploaded(server, r, round), replies)
        trained = {r.client.id: state for r, state in zip(replies, uploads, strict=True)}
        dilated = [r for r in replies if isinstance(r.plan, Compressed) and r.reply.state]
        for r in dilated:
            self._renew(server, selection(r), r.client.id)
        if steps := self._count(server, self.dilator_epochs, self.dilator_steps, round):
            classes = self._classes(server, dilated)
            server.pool.map(lambda members: self._train_dilators(server, members, trained, steps, round), classes)
        return server.pool.map(lambda r: self._grown(server, r, trained[r.client.id]), replies)

    def _uploaded(self, server: Server, returned: ReceivedReply, round: int) -> State:
        """What a client trained, fine-tuned on server data where the preset says so."""
        each = math.ceil(len(server.public.tune) / server.options.server_batch_size) if self.upload_epochs else 0
        state, sizes = {**returned.sent, **returned.reply.state}, returned.plan.sizes
        return server.train(state, self.upload_epochs * each, "upload", round, sizes=sizes, lr=1e-4, client=returned.client.id)

    def _classes(self, server: Server, replies: Sequence[ReceivedReply]) -> list[list[ReceivedReply]]:
        """Clients whose dilators are tuned as one batch: of one size class, where the model is slight enough for it to pay."""
        x = server.public.tune.all()[0][:2]
        model, positions = server.builder.build(), self.batch_size * math.prod(x.shape[2:])
        together = vectorized.is_worthwhile(
            model, sum(p.numel() for p in model.parameters()), positions
        ) and not vectorized.find_stacking_error(model, x)
        by_class: dict[Selection, list[ReceivedReply]] = {}
        for r in replies:
            by_class.setdefault(selection(r), []).append(r)
        most = TOGETHER if together else 1
        return [members[i : i + most] for members in by_class.values() for i in range(0, len(members), most)]

    def _goals(self, server: Server) -> Goals:
        """What submodels are to answer on the tune and hold-out examples: as the global model does, or the labels."""
        x, y = (torch.cat(parts) for parts in zip(server.public.tune.all(), server.public.holdout.all(), strict=True))
        if self.objective == "distill":
            parts = x.split(server.options.eval_batch_size)
            y = torch.cat(server.pool.map(lambda part: server.predict(server.state, part), parts))
        return y[: len(server.public.tune)], y[len(server.public.tune) :]

    def _steps(self, server: Server, round: int) -> int:
        """Compressor steps of a round."""
        steps = self.steps if round > 1 or self.first_steps is None else self.first_steps
        return self._count(server, self.epochs, steps, round)

    def _plan(self, server: Server, width: float, goals: Goals | None, round: int) -> Plan:
        selection = server.select(prefix(width))
        if selection.sizes == server.builder.full:
            return selection
        level = f"{width:g}"
        filters = self._compressors.get(level) or self._filters(server, selection, f"compressor {level}")
        self._compressors[level] = filters
        if goals is not None:
            self._compress(server, filters, goals, level, round)
        return Compressed(selection, filters.frozen(), self.mlr, self.residual)

    def _filters(self, server: Server, selection: Selection, purpose: str) -> Filters:
        names = [n for n, p in server.builder.model.named_parameters() if n in server.state and p.ndim]
        filters = Filters(selection, tiled(selection, server.state, names))
        if self.start == "random":
            filters.randomise(server.stream(purpose))
        if saved := {k.split("/", 1)[1]: v for k, v in self._saved.items() if k.startswith(f"{purpose}/")}:
            filters.load_state_dict(saved)
        return filters

    def _count(self, server: Server, epochs: int | None, steps: int, round: int) -> int:
        if epochs is None:
            return steps
        epochs = self.late_epochs if self.late_epochs is not None and round >= LATE else epochs
        return epochs * math.ceil(len(server.public.tune) / self.batch_size)

    def _compress(self, server: Server, filters: Filters, goals: Goals, level: str, round: int) -> None:
        """Tunes one size class: its submodel is to answer as the global model does, G frozen (spec 2.5)."""
        was, filters.touched = filters.touched, True
        small = Compressor(filters, server.state, self.mlr, self.residual)
        sizes = filters.selection.sizes
        tuned = self._tune(
            server, [filters.flat.requires_grad_()], lambda x: server.logits(small(), x, sizes), goals,
            f"compressor {level}", round, steps=self._steps(server, round), lr=rate(self.lr, round, self.halve_every),
        )  # fmt: skip
        filters.touched = was or tuned > 0

    def _tune(self, server: Server, weights: list[Tensor], student: Any, goals: Goals, purpose: str, round: int, **how: Any) -> int:
        """The step that was kept, of tuning `student` towards the logits or labels `goals` of the tune and hold-out examples."""
        x, hx, (goal, held) = server.public.tune.all()[0], server.public.holdout.all()[0], goals
        return server.tune(
            weights, lambda rows: self._loss(student(x[rows]), goal[rows]),
            lambda: float(self._loss(student(hx), held)), purpose, round, batch=self.batch_size, patience=self.patience, **how,
        ).step  # fmt: skip

    def _loss(self, logits: Tensor, goal: Tensor) -> Tensor:
        """Cross entropy, or T^2 KL(softmax(teacher / T) || softmax(student / T)) (findings 6.3)."""
        if self.objective == "ce":
            return F.cross_entropy(logits, goal)
        t = self.temperature
        return kl_divergence(logits, goal, t) * t * t

    def _grown(self, server: Server, returned: ReceivedReply, trained: State) -> Update:
        reply, plan = returned.reply, returned.plan
        filters = self._dilators.get(returned.client.id)
        if not (isinstance(plan, Compressed) and reply.state and filters):
            patches = plan.put(trained)
        elif not filters.touched:
            shifted = self.dilate == "update" and plan.filters.touched
            patches = moved(plan, server.state, trained, returned.sent if shifted else None)
        else:
            patches = self._patches(server.state, filters, self._change(returned, trained), plan.selection.put(trained))
        return Update(returned.client.id, {name: patches[name] for name in reply.state}, float(reply.examples), reply.extras)

    def _change(self, returned: ReceivedReply, trained: State) -> State:
        """What is dilated of a client: its weights or its update."""
        return trained if self.dilate == "weights" else difference(trained, returned.sent)

    def _renew(self, server: Server, selection: Selection, client: int) -> None:
        """New filters for a client that has none or whose capacity has changed."""
        old = self._dilators.get(client)
        if old is None or old.selection.sizes != selection.sizes:
            self._dilators[client] = self._filters(server, selection, f"dilator {client}")

    def _train_dilators(
        self, server: Server, members: Sequence[ReceivedReply], trained: Mapping[int, State], steps: int, round: int
    ) -> None:
        """Tunes the dilators of one size class, the clients' weights frozen; step 0 is among the choices (spec 2.5)."""
        clients = [r.client.id for r in members]
        filters = [self._dilators[i] for i in clients]
        flat = torch.stack([f.flat.detach() for f in filters]).requires_grad_()
        changes = joined([self._change(r, trained[r.client.id]) for r in members])
        goals = [self._taught(server, trained[r.client.id], r.plan.sizes) for r in members]
        goal, held = (torch.stack(parts) for parts in zip(*goals, strict=True))
        (x, _), (hx, _) = server.public.tune.all(), server.public.holdout.all()

        def losses(x: Tensor, goal: Tensor) -> Tensor:
            if len(members) == 1:
                large = self._large(server.state, filters[0], {n: t[0] for n, t in changes.items()}, flat[0])
                return self._loss(server.logits(large, x[0]), goal[0])[None]
            return torch.func.vmap(one)(flat, changes, x, goal)

        model = server.builder.module().eval()

        def one(weights: Tensor, change: State, x: Tensor, goal: Tensor) -> Tensor:
            large = self._large(server.state, filters[0], change, weights)
            return self._loss(torch.func.functional_call(model, large, (x,)), goal)

        numbers, held_x = torch.arange(len(members))[:, None], hx.expand(len(members), *hx.shape)
        tuned = server.tune_together(
            [flat], lambda rows: losses(x[rows], goal[numbers, rows]).sum(), lambda: losses(held_x, held),
            "dilator", round, clients,
            steps=steps, lr=rate(self.dilator_lr, round, self.halve_every), batch=self.batch_size, patience=self.patience,
        )  # fmt: skip
        for f, weights, result in zip(filters, flat.detach(), tuned, strict=True):
            f.flat, f.touched = weights.clone(), f.touched or result.step > 0

    def _taught(self, server: Server, trained: State, sizes: dict[str, int]) -> Goals:
        """What a grown model is to answer on the tune and hold-out examples: as the client's own does, or the labels."""
        (x, y), (hx, hy) = server.public.tune.all(), server.public.holdout.all()
        if self.objective == "ce":
            return y, hy
        return server.predict(trained, x, sizes), server.predict(trained, hx, sizes)

    def _large(self, state: State, filters: Filters, change: State, flat: Tensor) -> State:
        """The grown model of one client: its dilated weights, or the global model with its dilated update."""
        if self.dilate == "weights":
            return {**state, **dilate(filters, change, state, self.mlr, self.residual, flat)}
        cover = coverage(filters, state, flat)
        grown = dilate(filters, change, state, flat=flat)
        return {**state, **{n: state[n] + u / cover[n].clamp(min=1) for n, u in grown.items()}}

    def _patches(self, state: State, filters: Filters, change: State, plain: Mapping[str, Patch]) -> Mapping[str, Patch]:
        """Grown tensors and how far each entry is covered; tensors without filters stay where the plan puts them."""
        with torch.no_grad():
            if self.dilate == "weights":
                large = dilate(filters, change, state, self.mlr, self.residual)
                return {**plain, **{n: Patch(t) for n, t in large.items()}}
            cover, large = coverage(filters, state), dilate(filters, change, state)
            return {**plain, **{n: Patch(state[n] + over(t, cover[n]), {}, cover[n]) for n, t in large.items()}}

    def state_dict(self) -> State:
        kept = {f"compressor {level}": f for level, f in self._compressors.items()}
        kept |= {f"dilator {client}": f for client, f in self._dilators.items()}
        unused = {key: w for key, w in self._saved.items() if key.split("/", 1)[0] not in kept}
        return unused | {f"{purpose}/{key}": w for purpose, f in kept.items() if f.touched for key, w in f.state_dict().items()}

    def load_state_dict(self, state: State) -> None:
        self._saved, self._compressors, self._dilators = dict(state), {}, {}


def selection(returned: ReceivedReply) -> Selection:
    """The channels of a client that was sent a compressed model."""
    assert isinstance(returned.plan, Compressed)
    return returned.plan.selection


def joined(states: Sequence[State]) -> State:
    """One tensor (clients, …) for each name."""
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def difference(trained: State, sent: State) -> State:
    return {n: t - sent[n] if t.is_floating_point() else t for n, t in trained.items()}


def over(update: Tensor, cover: Tensor) -> Tensor:
    """U / M, 0 where nothing is covered."""
    return torch.where(cover > 0, update / cover.clamp(min=1e-12), 0.0)


def moved(plan: Compressed, state: State, trained: State, sent: State | None) -> Mapping[str, Patch]:
    """An untouched dilator is placement: the slice of G moved by what the client changed, or the client's own weights."""
    if sent is None:
        return plan.put(trained)
    base = plan.selection.take(state)
    return plan.put({n: base[n] + (t - sent[n]) if t.is_floating_point() else t for n, t in trained.items()})


def rate(lr: float, round: int, every: int) -> float:
    """The learning rate in `round` when it is halved every `every` rounds while above 1e-4 (spec 6.7)."""
    for _ in range(round // every if every else 0):
        lr = lr / 2 if lr > 1e-4 else lr
    return lr
