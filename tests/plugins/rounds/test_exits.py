"""Rounds of the strategies with exits, ScaleFL and DepthFL, against the same rounds in plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from helpers.plain import HIDDEN, UNEQUAL, Federation, descend, kl, least_skewed, mean

WIDTHS = (1.0, 0.7, 0.5)

NAMES = {  # what is needed for each exit: its layers and its classifier, and the dims that are of hidden layer 1 or 2
    1: {"net.1.weight": (1,), "net.1.bias": (1,), "heads.0.0.weight": (0, 1), "heads.0.0.bias": ()},
    2: {"net.3.weight": (2, 1), "net.3.bias": (2,), "heads.1.0.weight": (0, 2), "heads.1.0.bias": ()},
    3: {"net.5.weight": (0, 2), "net.5.bias": ()},
}


def names_of(depth):
    """The tensors of the first `depth` exits, with the dims that are cut."""
    return {n: dims for d in range(1, depth + 1) for n, dims in NAMES[d].items()}


def split(state, budget):
    """(exits, width): as near to the budget as a tenth, with the least |depth - width| (spec scalefl 1 d)."""

    def cost(depth, width):
        kept = sum(block(state[n], dims, width).numel() for n, dims in names_of(depth).items())
        return kept / sum(t.numel() for t in state.values())

    return least_skewed(cost, budget)


def at(dims, width):
    """Where the leading units of `width` lie in a tensor with these dims."""
    return tuple(slice(math.ceil(HIDDEN[d - 1] * width - 1e-9)) if d else slice(None) for d in dims)


def block(tensor, dims, width):
    return tensor[at(dims, width)]


def exits(w, x, depth):
    first = torch.relu(x.flatten(1) @ w["net.1.weight"].T + w["net.1.bias"])
    found = [first @ w["heads.0.0.weight"].T + w["heads.0.0.bias"]]
    if depth > 1:
        second = torch.relu(first @ w["net.3.weight"].T + w["net.3.bias"])
        found.append(second @ w["heads.1.0.weight"].T + w["heads.1.0.bias"])
    if depth > 2:
        found.append(second @ w["net.5.weight"].T + w["net.5.bias"])
    return found


@pytest.mark.parametrize(("form", "detach"), [("code", True), ("code", False), ("paper", True)])
def test_scalefl(simulate, form, detach):
    """spec scalefl 2: all exits learn, the early ones from the deepest once a quarter of the rounds is over"""
    options = {"scalefl": {"distill": 0.7, "temperature": 2.0, "form": form, "detach": detach}}
    values = {**UNEQUAL, "levels": "1,0.7,0.5", "rounds": 4, "set": options}
    plain = Federation(simulate(0, extract="scalefl", aggregate="overlap", **values))
    splits = [split(plain.first, w**2) for w in WIDTHS]
    assert len({depth for depth, _ in splits}) > 1
    assert len({width for _, width in splits}) > 1

    def loss(depth, weight):
        def of_batch(w, x, y):
            z = exits(w, x, depth)
            teacher, total = z[-1].detach() if detach else z[-1], 0.0
            for i, logits in enumerate(z, 1):
                distance = 4 * kl(logits, teacher, 2.0) / (10 if form == "code" else 1)
                total = total + i * (F.cross_entropy(logits, y) + (weight * distance if i < depth else 0.0))
            return total * (2 if form == "code" else 1) / (depth * (depth + 1))

        return of_batch

    def one_round(state, r):
        pasted = []
        for c, (depth, width) in enumerate(splits):
            sent = {n: block(state[n], dims, width) for n, dims in names_of(depth).items()}
            trained = descend(sent, plain.batches(c, r), loss(depth, 0.7 if r > 1 else 0.0))
            values, cover = ({n: torch.zeros_like(t) for n, t in state.items()} for _ in range(2))
            for n, dims in names_of(depth).items():
                values[n][at(dims, width)], cover[n][at(dims, width)] = trained[n], torch.ones(())
            pasted.append((values, cover))
        return mean(state, pasted)

    plain.follow(one_round)


@pytest.mark.parametrize("by", ["number", "parameters"])
def test_depthfl(simulate, by):
    """every exit learns the labels and what all others say, which counts exp(-5 (1 - t)^2), t the share of the rise that is over"""
    options = {"depthfl": {"by": by, "distill": 0.7, "rise": 0.5, "convs": 0}}
    values = {**UNEQUAL, "levels": "1,0.96,0.3", "rounds": 4, "set": options}
    plain = Federation(simulate(0, extract="depthfl", aggregate="overlap", **values))
    sizes = [sum(plain.first[n].numel() for n in names_of(depth)) for depth in (1, 2, 3)]
    budgets = [sum(size <= width**2 * sizes[-1] for size in sizes) for width in (1.0, 0.96, 0.3)]
    assert budgets == [3, 2, 0]
    depths = [3, 3, 1] if by == "number" else [3, 2, 1]

    def loss(depth, weight):
        def of_batch(w, x, y):
            z, total = exits(w, x, depth), 0.0
            for i in range(depth):
                total = total + F.cross_entropy(z[i], y)
                for j in set(range(depth)) - {i}:
                    total = total + weight * kl(z[i], z[j].detach()) / (depth - 1)
            return total

        return of_batch

    def one_round(state, r):
        pasted = []
        for c, depth in enumerate(depths):
            sent = {n: state[n] for n in names_of(depth)}
            weight = 0.7 * math.exp(-5 * (1 - min((r - 1) / 2, 1)) ** 2)
            trained = descend(sent, plain.batches(c, r), loss(depth, weight))
            values = {n: trained.get(n, torch.zeros_like(t)) for n, t in state.items()}
            pasted.append((values, {n: torch.full_like(t, float(n in trained)) for n, t in state.items()}))
        return mean(state, pasted)

    plain.follow(one_round, rounds=3)
