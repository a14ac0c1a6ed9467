"""Rounds of a perceptron 64-8-6-10 in plain torch, written from the specs: of the product, only the order of examples and the
initial weights are used."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from hetfl.data.dataset import Examples
from hetfl.rng import stream
from hetfl.rounds.loop import run_round
from hetfl.training.local import batch_rows

HIDDEN = (8, 6)

UNEQUAL = {
    "partition": "dirichlet",
    "alpha": 0.5,
    "batch_size": 8,
    "pretrain_steps": 60,
    "levels": "1,0.5,0.25",
    "server_data": 0.3,
}


def leading(width):
    """The units of the first and of the second hidden layer that a width leaves."""
    return tuple(torch.arange(math.ceil(n * width)) for n in HIDDEN)


def forward(w, x, scale=1.0):
    """The logits; hidden outputs are divided by `scale` before the activation."""
    h = torch.relu((x.flatten(1) @ w["1.weight"].T + w["1.bias"]) / scale)
    h = torch.relu((h @ w["3.weight"].T + w["3.bias"]) / scale)
    return h @ w["5.weight"].T + w["5.bias"]


def cut(w, units):
    """The perceptron of the units (a, b) of its hidden layers."""
    a, b = units
    return {
        "1.weight": w["1.weight"][a], "1.bias": w["1.bias"][a], "3.weight": w["3.weight"][b][:, a], "3.bias": w["3.bias"][b],
        "5.weight": w["5.weight"][:, b], "5.bias": w["5.bias"],
    }  # fmt: skip


def paste(small, units, like):
    """(values, coverage) of the whole perceptron's shapes, both 0 outside the units."""
    a, b = units
    places = {
        "1.weight": (a,), "1.bias": (a,), "3.weight": (b[:, None], a), "3.bias": (b,), "5.weight": (slice(None), b), "5.bias": (),
    }  # fmt: skip
    values, cover = ({n: torch.zeros_like(t) for n, t in like.items()} for _ in range(2))
    for name, at in places.items():
        values[name][at], cover[name][at] = small[name], torch.ones(())
    return values, cover


def mean(old, pasted, weights=None):
    """Entry by entry the weighted mean over the (values, coverage) that cover it, its old value where none does."""
    weights = weights or [1.0] * len(pasted)
    found = {}
    for name, before in old.items():
        total = sum(w * cover[name] * values[name] for w, (values, cover) in zip(weights, pasted, strict=True))
        count = sum(w * cover[name] for w, (_, cover) in zip(weights, pasted, strict=True))
        found[name] = torch.where(count > 0, total / count.clamp(min=1e-9), before)
    return found


def descend(w, batches, loss, *, masks=None, lr=0.05, momentum=0.9, clip=2.0, make=torch.optim.SGD):
    """The weights after a step for each batch (x, y) on `loss(w, x, y)`, gradients outside the masks 0, then clipped."""
    w = {n: t.clone().requires_grad_() for n, t in w.items()}
    optimizer = make(w.values(), lr, momentum) if make is torch.optim.SGD else make(w.values(), lr)
    for x, y in batches:
        optimizer.zero_grad()
        loss(w, x, y).backward()
        for name, mask in (masks or {}).items():
            if w[name].grad is not None:
                w[name].grad *= mask
        norm = torch.cat([t.grad.flatten() for t in w.values() if t.grad is not None]).norm()
        for t in w.values():
            if t.grad is not None and clip:
                t.grad *= min(1.0, clip / (float(norm) + 1e-6))
        optimizer.step()
    return {n: t.detach() for n, t in w.items()}


def cross_entropy(w, x, y):
    return F.cross_entropy(forward(w, x), y)


def kl(logits, teacher, t=1.0):
    """KL(softmax(teacher / t) || softmax(logits / t)), the mean over examples."""
    p = (teacher / t).softmax(1)
    return (p * (p.log() - (logits / t).log_softmax(1))).sum(1).mean()


def tune(w, judge, loss, batches, lr):
    """Adam on `loss(w, rows)` of each batch of rows; the weights of the lowest `judge(w)` of steps 0, 10, 20, … and the last."""
    w = {n: t.clone().requires_grad_() for n, t in w.items()}
    optimizer = torch.optim.Adam(w.values(), lr)
    best, least = {n: t.detach().clone() for n, t in w.items()}, float(judge(w).detach())
    for step, rows in enumerate(batches, 1):
        optimizer.zero_grad()
        loss(w, rows).backward()
        optimizer.step()
        if (step % 10 == 0 or step == len(batches)) and float(judge(w).detach()) < least:
            best, least = {n: t.detach().clone() for n, t in w.items()}, float(judge(w).detach())
    return best


class Federation:
    """A `simulate`d federation before its first round, as plain tensors."""

    def __init__(self, made):
        self.made, self.options = made, made.options
        self.first = {n: t.clone() for n, t in made.server.state.items()}
        self.untrained = {n: t.clone() for n, t in made.initial.items()}
        self.clients = range(len(made.federation.clients))
        self.sizes = [len(c.train) for c in made.federation.clients]
        self.classes = [torch.tensor([bool((c.train.all()[1] == k).any()) for k in range(10)]) for c in made.federation.clients]
        self.x, self.y = made.federation.public.tune.all()
        self.held_x, self.held_y = made.federation.public.holdout.all()

    def stream(self, purpose, round=0, client=-1):
        return stream(self.options.seed, purpose, round, client)

    def batches(self, client, round, index=None):
        """The client's batches of a round, of the rows `index` where given."""
        data = self.made.federation.clients[client].train
        data = data if index is None else Examples(data.x, data.y, index)
        rows = batch_rows(data, self.options, self.stream("batches", round, client), nn.Identity())
        return [(data.x[r], data.y[r]) for r in rows]

    def index(self, client):
        return self.made.federation.clients[client].train.index

    def examples(self, client, index=None):
        data = self.made.federation.clients[client].train
        rows = data.index if index is None else index
        return data.x[rows], data.y[rows]

    def cycle(self, count, batch, steps, purpose, round=0, client=-1):
        """`steps` batches of rows below `count`, pass after pass in new orders."""
        generator, rows = self.stream(purpose, round, client), []
        while len(rows) < steps:
            rows += torch.randperm(count, generator=generator).split(min(batch, count))
        return rows[:steps]

    def follow(self, one_round, rounds=2, first=1, seen=lambda w: w, within=1e-5):
        """The product's rounds, what `seen` makes of each compared with that of `one_round(state, number)`."""
        state = self.first
        for number in range(first, first + rounds):
            self.made.last = run_round(self.made.state, number, self.made.engine)
            assert not any("fault" in row for row in self.made.state.client_rows)
            state = one_round(state, number)
            agree(seen(state), seen(self.made.server.state), within)
        return state


def agree(ours, theirs, within=1e-5):
    assert ours.keys() == theirs.keys()
    apart = {n: float((ours[n] - theirs[n]).abs().max()) for n in ours}
    assert max(apart.values()) <= within, apart


def least_skewed(cost, budget):
    """(depth of 3, width) within a tenth of the budget by `cost`, with the least |depth - width| (spec scalefl 1 d)."""
    if budget >= 1:
        return 3, 1.0
    tried = [(depth, k / 128) for depth in (1, 2, 3) for k in range(1, 129)] + [(depth, depth / 3) for depth in (1, 2, 3)]
    near = [(abs(depth / 3 - width), depth, width) for depth, width in tried if abs(cost(depth, width) / budget - 1) <= 0.1]
    return min(near)[1:]
