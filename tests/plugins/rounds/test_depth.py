"""Rounds of the strategies that leave residual blocks out, against the same rounds in plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from helpers.plain import UNEQUAL, Federation, descend, least_skewed, mean
from helpers.residual import BLOCKS, RESIDUAL, forward, keep, pad
from hetfl import NotApplicable
from hetfl.rounds.loop import run_round

FOUR = {**UNEQUAL, **RESIDUAL, "clients": 4, "limit": 200, "levels": "1,0.6,0.6,0.3"}


def cross_entropy(w, x, y):
    return F.cross_entropy(forward(w, x), y)


def test_fedra(simulate):
    """as many random blocks as the budget holds, others for each client and round; the mean over those who have them"""
    plain = Federation(simulate(0, extract="fedra", aggregate="overlap", **{**FOUR, "levels": "1,0.97,0.94,0.3"}))
    block = sum(t.numel() for n, t in plain.first.items() if n.startswith(BLOCKS[0]))
    total = sum(t.numel() for t in plain.first.values())
    numbers = [max(k for k in (1, 2, 3) if k == 1 or total - (3 - k) * block <= w**2 * total) for w in (1, 0.97, 0.94, 0.3)]
    assert numbers == [3, 2, 1, 1]
    drawn = []

    def one_round(state, r):
        pasted = []
        for c, number in enumerate(numbers):
            order = torch.randperm(3, generator=plain.stream("fedra", r, c)).tolist()[:number]
            drawn.append((c, sorted(order)))
            pasted.append(pad(descend(keep(state, [BLOCKS[i] for i in order]), plain.batches(c, r), cross_entropy), state))
        return mean(state, pasted)

    plain.follow(one_round, rounds=3)
    assert {len({tuple(order) for client, order in drawn if client == c}) > 1 for c in (1, 2)} == {True}
    assert [n for n in plain.made.last.assignments[3].plan.sizes if n.startswith("block ")] != []


@pytest.mark.parametrize("own", [True, False])
def test_inclusivefl(simulate, own):
    """the last layer and the head of a size are its own, and the last moves by beta of what the next larger size's layers moved"""
    beta, depths, levels = 0.3, (3, 2, 2, 1), ("1", "0.6", "0.6", "0.3")
    options = {"inclusivefl": {"by": "number", "beta": beta, "own_last": own, "own_head": own}}
    plain = Federation(simulate(0, extract="inclusivefl", aggregate="inclusivefl", **{**FOUR, "set": options}))
    branches, changed = {}, {}

    def is_own(name, depth):
        return own and (name.startswith(("head", BLOCKS[depth - 1])))

    def one_round(state, r):
        nonlocal changed
        views = [{**state, **branches.get(level, {})} for level in levels]
        sent = [keep(view, BLOCKS[:depth]) for view, depth in zip(views, depths, strict=True)]
        trained = [descend(s, plain.batches(c, r), cross_entropy) for c, s in enumerate(sent)]
        now = {}
        for level in dict.fromkeys(levels):
            ours = [c for c in range(4) if levels[c] == level]
            n = [plain.sizes[c] for c in ours]
            middle = {k: sum(w * trained[c][k] for w, c in zip(n, ours, strict=True)) / sum(n) for k in sent[ours[0]]}
            now[level] = {k: t - views[ours[0]][k] for k, t in middle.items()}
        for c, depth in enumerate(depths):
            larger = {1: "0.6", 2: "1"}.get(depth)
            if r > 1 and larger:
                for name in (k for k in trained[c] if k.startswith(BLOCKS[depth - 1])):
                    deeper = [changed[larger][b + name.removeprefix(BLOCKS[depth - 1])] for b in BLOCKS[depth - 1 : depth + 1]]
                    taught = sum(deeper) / len(deeper)
                    trained[c][name] = sent[c][name] + (1 - beta) * (trained[c][name] - sent[c][name]) + beta * taught
        changed = now
        shared = [{k: t for k, t in trained[c].items() if not is_own(k, depths[c])} for c in range(4)]
        found = mean(state, [pad(s, state) for s in shared], plain.sizes)
        for level in dict.fromkeys(levels):
            ours = [c for c in range(4) if levels[c] == level]
            apart = [{k: t for k, t in trained[c].items() if is_own(k, depths[c])} for c in ours]
            averaged = mean(state, [pad(a, state) for a in apart], [plain.sizes[c] for c in ours])
            branches[level] = {**branches.get(level, {}), **{k: averaged[k] for k in apart[0]}}
        return {**found, **branches["1"]}

    plain.follow(one_round, rounds=3)
    found = {level: {n: p.values for n, p in plain.made.server.branches[f"level {level}"].items()} for level in branches}
    assert [set(found[level]) for level in branches] == [set(ours) for ours in branches.values()]
    assert all(torch.allclose(found[level][n], t, atol=1e-5) for level, ours in branches.items() for n, t in ours.items())
    assert bool(branches["0.3"]) == own


def test_depth_is_not_applicable_without_blocks_or_to_other_subsets(simulate):
    for extract in ("fedra", "inclusivefl"):
        with pytest.raises(NotApplicable, match="no residual blocks"):
            simulate(1, extract=extract, aggregate="overlap")
    with pytest.raises(NotApplicable, match="other layers than the first ones"):
        simulate(3, extract="fedra", aggregate="inclusivefl", **{**FOUR, "set": {"fedra": {"by": "number"}}})


def test_nefl(simulate):
    """width and depth split the budget, the first blocks first; step sizes are each size's own"""
    widths = (1.0, 0.9, 0.9, 0.6)
    plain = Federation(simulate(0, extract="nefl", aggregate="nefl", **{**FOUR, "levels": "1,0.9,0.9,0.6"}))
    levels, splits, branches = [f"{w:g}" for w in widths], [split(plain.first, w**2) for w in widths], {}
    assert splits[0] == (3, 1.0)
    assert len(set(splits)) == 3
    assert {depth for depth, _ in splits} > {3}

    def one_round(state, r):
        trained, steps = [], []
        for c, (depth, width) in enumerate(splits):
            view = {**state, **branches.get(levels[c], {})}
            sent = {n: narrow(n, t, width) for n, t in keep(view, BLOCKS[:depth]).items()}
            small = descend(sent, plain.batches(c, r), cross_entropy)
            values, cover = ({n: torch.zeros_like(t) for n, t in state.items()} for _ in range(2))
            for n, t in small.items():
                narrow(n, values[n], width)[...], narrow(n, cover[n], width)[...] = t, torch.ones(())
            trained.append(({n: t for n, t in values.items() if n[-4:] != "step"}, cover))
            steps.append({n: t for n, t in small.items() if n[-4:] == "step"})
        found = mean({n: t for n, t in state.items() if n[-4:] != "step"}, trained)
        for level in dict.fromkeys(levels):
            ours = [s for s, at in zip(steps, levels, strict=True) if at == level]
            branches[level] = {n: sum(s[n] for s in ours) / len(ours) for n in ours[0]}
        return {**found, **branches["1"]}

    plain.follow(one_round, rounds=2)
    for level, ours in branches.items():
        found = {n: p.values for n, p in plain.made.server.branches[f"level {level}"].items()}
        assert found.keys() == ours.keys()
        assert all(torch.allclose(found[n], t, atol=1e-5) for n, t in ours.items())
    assert len({float(ours["blocks.0.step"]) for ours in branches.values()}) == 3


SIDES = {"inputs.weight": "o", "inputs.bias": "o", "up.weight": "hi", "up.bias": "h", "down.weight": "ih", "down.bias": "i"}


def narrow(name, tensor, width):
    """A view of the leading units of a width: of the stream of 6 between blocks, of the 5 within one."""
    sizes = {"h": math.ceil(5 * width - 1e-9), "i": math.ceil(6 * width - 1e-9), "o": math.ceil(6 * width - 1e-9)}
    if name == "head.weight":
        return tensor[:, : sizes["i"]]
    sides = next((sides for end, sides in SIDES.items() if name.endswith(end)), "")
    return tensor[tuple(slice(sizes[side]) for side in sides)] if sides else tensor


def split(state, budget):
    """(blocks, width) of the least |depth - width| with parameters within a tenth of the budget."""

    def cost(depth, width):
        kept = sum(narrow(n, t, width).numel() for n, t in keep(state, BLOCKS[:depth]).items())
        return kept / sum(t.numel() for t in state.values())

    return least_skewed(cost, budget)


def test_what_a_client_keeps_of_a_block_outlasts_the_rounds_without_it(simulate):
    """fedsa keeps B at home: a client that draws a block again finds its own there"""
    values = {**FOUR, "adapter": "lora:rank=2", "wrap": ("fedsa",), "set": {"fedra": {"by": "number"}}}
    made, drawn = simulate(0, extract="fedra", aggregate="overlap", **values), set()
    for number in range(1, 5):
        made.last = run_round(made.state, number, made.engine)
        drawn |= {b for b in BLOCKS if f"block {b}" not in made.last.assignments[3].plan.sizes}
        home = made.engine.client_states()[3]["home"]
        assert {name.rpartition(".up.")[0] or name.rpartition(".down.")[0] for name in home if name.startswith("blocks")} == drawn
    assert len(drawn) > 1
