"""Rounds of every strategy that chooses units or weights by their values, against the same rounds in plain torch."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.plain import HIDDEN, UNEQUAL, Federation, agree, cross_entropy, cut, descend, forward, mean, paste

WIDTHS = (1.0, 0.5, 0.25)

LEARNED = {**UNEQUAL, "pretrain_steps": 200, "limit": 240, "server_lr": 0.01}  # so that some clients are good enough to prune

STAGES = ("1", "3", "5")

WEIGHTS = tuple(f"{stage}.weight" for stage in STAGES)


def accuracy(w, x, y):
    return float((forward(w, x).argmax(1) == y).float().mean())


def held_back(plain, client):
    """(rows to train on, rows to decide by): each fifth example decides."""
    index, at = plain.index(client), torch.arange(plain.sizes[client])
    return index[at % 5 != 4], index[at % 5 == 4]


def whole(w):
    return w, {n: torch.ones_like(t) for n, t in w.items()}


@pytest.mark.parametrize("by", ["model", "layer"])
@pytest.mark.parametrize("biased", [True, False])
def test_fiarse(simulate, by, biased):
    """spec fiarse 2, with its plain SGD"""
    options = {"extract": {"fiarse": {"by": by, "biased": biased}}, "aggregate": {"fiarse": {"rate": 0.8}}}
    plain = Federation(simulate(0, extract="fiarse", aggregate="fiarse", momentum=0.0, set=options, **UNEQUAL))

    def thresholds(state, gamma):
        found = {}
        for stages in [STAGES] if by == "model" else [(stage,) for stage in STAGES]:
            names = [n for n in state if n[0] in stages]
            ordered = torch.cat([state[n].abs().flatten() for n in names]).sort(descending=True).values
            found |= dict.fromkeys(names, ordered[max(1, int(gamma * len(ordered))) - 1])
        return found

    def with_bias(w, theta):
        """The kept weights, whose gradient is 1 + 2 s theta / (s + theta)^2 times as large."""
        kept = {}
        for n, t in w.items():
            s, mask = t.detach().abs(), (t.detach().abs() >= theta[n]).float()
            surrogate = t * mask * (1 + 2 * s * theta[n] / (s + theta[n]) ** 2)
            kept[n] = surrogate - surrogate.detach() + t.detach() * mask
        return kept

    def one_round(state, r):
        pasted = []
        for c in plain.clients:
            theta = thresholds(state, WIDTHS[c] ** 2)
            masks = {n: (t.abs() >= theta[n]).float() for n, t in state.items()}
            sent = {n: t * masks[n] for n, t in state.items()}
            loss = (lambda w, x, y, theta=theta: cross_entropy(with_bias(w, theta), x, y)) if biased else cross_entropy
            pasted.append((descend(sent, plain.batches(c, r), loss, masks=masks, momentum=0.0), masks))
        merged = mean(state, pasted)
        return {n: t + 0.8 * (merged[n] - t) for n, t in state.items()}

    plain.follow(one_round)


def test_fiarse_by_neurons(simulate):
    """Whole units by their mean magnitude, weights and bias together."""
    options = {"extract": {"fiarse": {"by": "neuron"}}}
    plain = Federation(simulate(0, extract="fiarse", aggregate="overlap", set=options, **UNEQUAL))

    def strongest(state, stage, number):
        rows = torch.cat([state[f"{stage}.weight"], state[f"{stage}.bias"][:, None]], 1)
        return rows.abs().mean(1).argsort(descending=True)[:number].sort().values

    def one_round(state, r):
        units = [tuple(strongest(state, s, math.ceil(n * w)) for s, n in zip("13", HIDDEN, strict=True)) for w in WIDTHS]
        trained = [descend(cut(state, u), plain.batches(c, r), cross_entropy) for c, u in enumerate(units)]
        return mean(state, [paste(w, u, state) for w, u in zip(trained, units, strict=True)])

    plain.follow(one_round)


@pytest.mark.parametrize("clamp", [False, True])
def test_lotteryfl(simulate, clamp):
    """spec lotteryfl 1, 2: who is good enough prunes each layer's smallest weights and rewinds"""
    target = 0.7 if clamp else None
    options = {"lotteryfl": {"threshold": 0.6, "clamp": clamp, "target": target}}
    plain = Federation(simulate(0, extract="lotteryfl", aggregate="overlap", set=options, **LEARNED))
    ones = {n: torch.ones_like(t) for n, t in plain.first.items()}
    masks, remaining, decided = [dict(ones) for _ in plain.clients], [1.0] * 3, set()

    def one_round(state, r):
        pasted = []
        for c in plain.clients:
            train, held = held_back(plain, c)
            own = {n: t * masks[c][n] for n, t in state.items()}
            goal = target or WIDTHS[c] ** 2
            good = accuracy(own, *plain.examples(c, held)) > 0.6
            decided.add(good)
            if good and remaining[c] > goal:
                after = max(remaining[c] * 0.8, goal) if clamp else remaining[c] * 0.8
                for n in WEIGHTS:
                    alive = own[n].abs()[(masks[c][n] > 0) & (own[n] != 0)].double()
                    least = torch.quantile(alive, 1 - after / remaining[c])
                    masks[c][n] = masks[c][n] * (own[n].abs().double() >= least)
                remaining[c] = after
                own = {n: t * masks[c][n] for n, t in plain.first.items()}
            pasted.append((descend(own, plain.batches(c, r, train), cross_entropy, masks=masks[c]), masks[c]))
        return mean(state, pasted)

    plain.follow(one_round, rounds=3)
    assert decided == {True, False}
    assert any(0.7 <= share < 0.8 if clamp else share < 0.8 for share in remaining)


def lasso(w):
    """The norms of all rows and of all columns of the weights."""
    return sum(torch.linalg.vector_norm(w[n], dim=1).sum() + torch.linalg.vector_norm(w[n], dim=0).sum() for n in WEIGHTS)


@pytest.mark.parametrize(("overlap", "weighting"), [("any", "uniform"), ("all", "samples")])
def test_hermes(simulate, overlap, weighting):
    """spec hermes 1, 2: who is good enough drops its weakest channels; what several hold is averaged, the rest is each one's own"""
    options = {
        "extract": {"hermes": {"threshold": 0.6, "rate": 0.4, "lasso": 0.01}},
        "aggregate": {"hermes": {"overlap": overlap, "weighting": weighting}},
    }
    made = simulate(0, extract="hermes", aggregate="hermes", set=options, **LEARNED)
    plain, decided = Federation(made), set()
    units, own, remaining = [tuple(torch.arange(n) for n in HIDDEN)] * 3, [plain.first] * 3, [1.0] * 3
    votes = [len(held_back(plain, c)[0]) for c in plain.clients] if weighting == "samples" else [1.0] * 3

    def strongest(w, stage, size):
        rows = torch.cat([w[f"{stage}.weight"], w[f"{stage}.bias"][:, None]], 1)
        return rows.norm(dim=1).argsort(descending=True)[: math.ceil(size)].sort().values

    def one_round(state, r):
        pasted = []
        for c in plain.clients:
            train, held = held_back(plain, c)
            good = accuracy(own[c], *plain.examples(c, held)) > 0.6
            decided.add(good)
            if good and remaining[c] > WIDTHS[c] ** 2:
                remaining[c] = max(remaining[c] * 0.6, WIDTHS[c] ** 2)
                kept = tuple(strongest(own[c], s, n * remaining[c] ** 0.5) for s, n in zip("13", HIDDEN, strict=True))
                own[c], units[c] = cut(own[c], kept), tuple(u[k] for u, k in zip(units[c], kept, strict=True))
            loss = lambda w, x, y: cross_entropy(w, x, y) + 0.01 * lasso(w)  # noqa: E731
            own[c] = descend(own[c], plain.batches(c, r, train), loss)
            pasted.append(paste(own[c], units[c], state))
        merged, holders = mean(state, pasted, votes), {n: sum(cover[n] for _, cover in pasted) for n in state}
        for c in plain.clients:
            shared = {n: holders[n] >= (3 if overlap == "all" else 2) for n in state}
            own[c] = cut({n: torch.where(shared[n], merged[n], pasted[c][0][n]) for n in state}, units[c])
            agree(own[c], cut(made.server.branch(f"client {c}"), units[c]))
        return merged

    plain.follow(one_round, rounds=3)
    assert decided == {True, False}
    assert any(len(a) < 8 for a, _ in units)


def test_tailorfl(simulate):
    """spec tailorfl 2: importance in round 1, then slices over p, weighted by n / p, their personal filters swapped"""
    values = {**UNEQUAL, "levels": "1,0.6,0.6"}
    options = {"extract": {"tailorfl": {"steps": 12, "importance_lr": 2.0, "tune": 0.4, "step": 0.25}}}
    made = simulate(0, extract="tailorfl", aggregate="tailorfl", set=options, rounds=4, **values)
    plain, ratios, importance, lists, swaps = Federation(made), (1.0, 0.5, 0.5), [], [], []

    def learn(state, c):
        u = {s: torch.ones(n) for s, n in zip("13", HIDDEN, strict=True)}
        batches = plain.batches(c, 1)
        for k in range(12):
            u = {s: t.clone().requires_grad_() for s, t in u.items()}
            x, y = batches[k % len(batches)]
            gated = {**state, "3.weight": state["3.weight"] * u["1"], "5.weight": state["5.weight"] * u["3"]}
            (cross_entropy(gated, x, y) + 0.5 * sum(t.square().sum() for t in u.values()) / sum(HIDDEN)).backward()
            u = {s: (t - 2.0 * t.grad).clamp(0, 1).detach() for s, t in u.items()}
        return u

    def swap(i):
        """Client i's personal filters after the server's tuning, all from the lists before it."""
        before, mine = [set(f.tolist()) for f in lists], set(lists[i].tolist())
        theta = torch.stack([u["3"] - u["3"].mean() for u in importance])
        for _ in range(max(1, int(0.4 * min(len(mine), HIDDEN[1] - len(mine))))):
            q = torch.zeros(HIDDEN[1])
            for j in plain.clients:
                if j != i:
                    alike = torch.cosine_similarity(theta[i], theta[j], dim=0)
                    wish = alike * min(len(mine), len(before[j])) - len(mine & before[j])
                    q[sorted(before[j])] += wish
            outside = sorted(set(range(HIDDEN[1])) - mine)
            if not outside:
                break
            out, into = min(sorted(mine), key=lambda f: q[f]), max(outside, key=lambda f: q[f])
            if q[out] >= q[into]:
                break
            mine = mine - {out} | {into}
            swaps.append((i, out, into))
        return torch.tensor(sorted(mine))

    def one_round(state, r):
        if r == 1:
            importance.extend(learn(state, c) for c in plain.clients)
            return state
        kept = [[max(1, int(n * p)) for n in HIDDEN] for p in ratios]
        if r == 2:
            ranks = [(u["3"] ** 2).argsort(descending=True, stable=True) for u in importance]
            lists.extend(rank[: k[1]].sort().values for rank, k in zip(ranks, kept, strict=True))
        else:
            lists[:] = [swap(i) for i in plain.clients]
        strength = state["1.weight"].square().sum(1) + state["1.bias"].square()
        pasted = []
        for c, p in enumerate(ratios):
            units = strength.argsort(descending=True)[: kept[c][0]].sort().values, lists[c]
            sent = {n: t / p if t.ndim > 1 else t for n, t in cut(state, units).items()}
            trained = descend(sent, plain.batches(c, r), cross_entropy)
            pasted.append(paste({n: t * p if t.ndim > 1 else t for n, t in trained.items()}, units, state))
        return mean(state, pasted, [n / p for n, p in zip(plain.sizes, ratios, strict=True)])

    plain.follow(one_round, rounds=4)
    assert swaps
