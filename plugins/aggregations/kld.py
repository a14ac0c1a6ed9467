"""FedConv's aggregation (Shen et al., MobiSys 2024): learned weights, held near the previous global model by a KLD term.

The paper's formula is unknown to us; what is built here is our reading (spec fedconv 2.5 and 2.6, findings 5 and 6.6).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor
from torch.nn import functional as F

from hetfl import Field, Merged, PresetPlugin, Selection, Server, State, Update, Updates, hookimpl, mean, prefix
from hetfl.training.tuning import halve_rate

FEW = 250  # labelled tune images, below which fewer steps are taken


class KLD(PresetPlugin):
    """A(w) = G + sum n w c (x - G) / sum n c, with w tuned on the server's data; w = 1 is the mean over covering clients."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "default": {},
        "paper": {"form": "weights", "epochs": 20, "lr": 1e-3, "batch_size": 32},
        "reference": {"form": "weights", "epochs": 20, "lr": 1e-3, "batch_size": 32, "halve_every": 25, "kld": 0.0,
                      "shape": "element", "start": "normal", "guard": False},
    }  # fmt: skip

    DEVIATES: ClassVar[tuple[tuple[str, str, str, str], ...]] = (
        (
            "aggregation weights",
            "per client, tensor and output channel, on the update, start 1",
            "elementwise N(0, 1) in the code",
            "w is then a server step size: w = 1 is the overlap mean, w = 0 ignores a client",
        ),
        (
            "KLD",
            "outputs of the new against the previous global model, coefficient 1",
            "the formula is not known to us; none in the code",
            "our reading; neutral in the design study",
        ),
    )

    form: Literal["update", "weights"] = Field("update", description="weigh what clients changed, or their weights")
    shape: Literal["client", "tensor", "channel", "element"] = Field("channel", description="what has a weight of its own")
    start: Literal["one", "normal"] = Field("one", description="start of the weights: 1, or N(0, 1)")
    kld: float = Field(1.0, ge=0, description="coefficient of the KLD term (0: cross entropy alone)")
    kld_on: Literal["outputs", "parameters"] = Field("outputs", description="compare the models' outputs or their parameters")
    levels: Literal["global", "fleet", "worst"] = Field(
        "global", description="whose loss counts: the whole model's, the mean over the fleet's levels, or the worst level's"
    )
    distill: float = Field(0.0, ge=0, description="coefficient of KL(whole model || level), mean over the levels below it")
    steps: int | None = Field(None, ge=0, description="steps a round (none: 20 below 250 labelled tune images, else 60)")
    epochs: int | None = Field(None, ge=0, description="epochs a round over the server's data, in place of steps")
    lr: float = Field(1e-2, gt=0, description="Adam learning rate of the weights")
    halve_every: int = Field(0, ge=0, description="halve the learning rate every N rounds while above 1e-4 (0: never)")
    batch_size: int = Field(64, ge=1, description="server examples in a step")
    guard: bool = Field(True, description="start again from 1 where the hold-out likes that better than last round's weights")
    _w: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update], round: int) -> Merged:
        updates = Updates(updates, server.state)
        plain = mean(updates, updates.weights)
        steps = self._count_steps(server)
        names = [n for n, p in server.builder.model.named_parameters() if n in server.state and p.requires_grad]
        w = {n: self._start_weights(server, updates, n) for n in names}
        if self.form == "update" and not steps and all(bool((t == 1).all()) for t in w.values()):
            return Merged(plain)
        base, terms = self._fix_terms(updates, names)
        if steps:
            self._tune(server, plain, base, terms, w, steps, round)
        for n in names:
            self._w |= {f"{u.client}/{n}": w[n][k].detach().clone() for k, u in enumerate(updates)}
        if self.form == "update" and all(bool((t == 1).all()) for t in w.values()):
            return Merged(plain)
        return Merged({**plain, **{n: t.detach() for n, t in weigh_terms(base, terms, w).items()}})

    def _count_steps(self, server: Server) -> int:
        """Tuning steps of a round."""
        if self.epochs is not None:
            return self.epochs * math.ceil(len(server.public.tune) / self.batch_size)
        return self.steps if self.steps is not None else 20 if len(server.public.tune) < FEW else 60

    def _start_weights(self, server: Server, updates: Updates, name: str) -> Tensor:
        """The weights (clients, …) of one tensor: last round's where a client has them, else the start."""
        shape = self._weight_shape(server.state[name])
        fresh = torch.ones(shape)
        rows = []
        for u in updates:
            if self.start == "normal" and f"{u.client}/{name}" not in self._w:
                fresh = torch.randn(shape, generator=server.stream(f"kld {name}", 0, u.client))
            rows.append(self._w.get(f"{u.client}/{name}", fresh))
        return torch.stack(rows)

    def _weight_shape(self, tensor: Tensor) -> tuple[int, ...]:
        """The shape of one client's weights of a tensor, broadcastable to the tensor's (spec fedconv 2.6)."""
        rows = tuple(tensor.shape) if self.shape == "element" else tuple(tensor.shape[:1]) if self.shape == "channel" else (1,)
        return rows + (1,) * (tensor.ndim - len(rows)) if tensor.ndim else ()

    def _fix_terms(self, updates: Updates, names: list[str]) -> tuple[State, State]:
        """What is fixed while w is tuned: A(w)[n] = base[n] + sum over clients of w[n] * terms[n]."""
        base, terms = {}, {}
        for n in names:
            values, cover = updates.column(n)
            share = torch.tensor(updates.weights).reshape(-1, *[1] * updates.old[n].ndim)
            if self.form == "update":
                count = (share * cover).sum(0)
                term = share * cover * (values - updates.old[n]) / count.clamp(min=1e-12)
                base[n], terms[n] = updates.old[n], torch.where(count > 0, term, 0.0)
            else:
                mixed = cover * values + (1 - cover) * updates.old[n]
                base[n], terms[n] = torch.zeros_like(updates.old[n]), share * mixed / share.sum()
        return base, terms

    def _tune(self, server: Server, plain: State, base: State, terms: State, w: State, steps: int, round: int) -> None:
        """mean CE(f(x; A(w)), y) + lambda KLD towards the previous global model; the best step by hold-out CE (findings 6.7)."""
        (x, y), (hx, hy) = server.public.tune.all(), server.public.holdout.all()
        levels = self._find_levels(server)
        with torch.no_grad():
            before = server.logits(server.state, x)

        def model(weights: State) -> State:
            return {**plain, **weigh_terms(base, terms, weights)}

        def loss(rows: Tensor) -> Tensor:
            now = model(w)
            logits = [server.logits(level.take(now), x[rows], level.sizes) for level in levels]
            drift = self.kld * self._divergence(server, now, logits[0], before[rows])
            return self._level_loss(server, logits, y[rows]) + drift + self._teach_levels(server, logits)

        def judge(weights: State = w) -> float:
            now = model(weights)
            return float(self._level_loss(server, [server.logits(level.take(now), hx, level.sizes) for level in levels], hy))

        with torch.no_grad():
            if self.guard and judge() > judge({n: torch.ones_like(t) for n, t in w.items()}):
                w.update({n: torch.ones_like(t) for n, t in w.items()})
        weights = [t.requires_grad_() for t in w.values()]
        lr = halve_rate(self.lr, round, self.halve_every)
        server.tune(weights, loss, judge, "kld", round, steps=steps, lr=lr, batch=self.batch_size)

    def _find_levels(self, server: Server) -> list[Selection]:
        """The whole model first, then the leading slices of the fleet's other widths, where their losses count."""
        fleet = {client.profile.width for client in server.clients.values()} if self.levels != "global" else set()
        return [server.select(prefix(width)) for width in sorted({1.0, *fleet}, reverse=True)]

    def _level_loss(self, server: Server, logits: list[Tensor], y: Tensor) -> Tensor:
        """The mean, or the largest, of the levels' losses."""
        losses = torch.stack([server.kind.loss(out, y) for out in logits])
        return losses.max() if self.levels == "worst" else losses.mean()

    def _teach_levels(self, server: Server, logits: list[Tensor]) -> Tensor:
        """KL(whole || level) of the outputs on a batch, mean over the levels below the whole model, times its coefficient."""
        if not self.distill or len(logits) < 2:
            return torch.zeros(())
        terms = [server.kind.divergence(out, logits[0].detach()) for out in logits[1:]]
        return self.distill * torch.stack(terms).mean()

    def _divergence(self, server: Server, now: State, logits: Tensor, before: Tensor) -> Tensor:
        """KL(previous || new) of the outputs on a batch, or KL(new || previous) of every parameter tensor as a softmax over its
        entries (spec 2.5)."""
        if not self.kld:
            return torch.zeros(())
        if self.kld_on == "outputs":
            return server.kind.divergence(logits, before)
        flat = [(now[n].flatten(), server.state[n].flatten()) for n in now if now[n].requires_grad]
        return torch.stack([F.kl_div(g.log_softmax(0), a.log_softmax(0), reduction="sum", log_target=True) for a, g in flat]).sum()

    def state_dict(self) -> State:
        return dict(self._w)

    def load_state_dict(self, state: State) -> None:
        self._w = dict(state)


def weigh_terms(base: State, terms: State, w: State) -> State:
    """A(w) = base + sum over clients (dim 0) of w * terms, for each tensor."""
    return {n: base[n] + (w[n] * terms[n]).sum(0) for n in base}
