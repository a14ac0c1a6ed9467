"""Two rounds of every strategy that slices, against the same rounds in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from helpers.plain import HIDDEN, UNEQUAL, Federation, cross_entropy, cut, descend, forward, kl, leading, mean, paste, tune

WIDTHS = (1.0, 0.5, 0.25)


def slices(federation, state, round, units, loss=lambda c: cross_entropy):
    """What each client returns of its units: (values, coverage)."""
    trained = [descend(cut(state, units[c]), federation.batches(c, round), loss(c)) for c in federation.clients]
    return [paste(w, u, state) for w, u in zip(trained, units, strict=True)]


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_heterofl_by_overlap(simulate, weighting):
    """spec heterofl 2.2, 2.5"""
    made = simulate(0, extract="heterofl", aggregate="overlap", set={"overlap": {"weighting": weighting}}, **UNEQUAL)
    plain = Federation(made)
    weights = plain.sizes if weighting == "samples" else None
    assert len(set(plain.sizes)) == 3
    plain.follow(lambda state, r: mean(state, slices(plain, state, r, [leading(w) for w in WIDTHS]), weights))


@pytest.mark.parametrize(("direction", "step"), [("forward", 1), ("backward", 3)])
def test_fedrolex(simulate, direction, step):
    """spec fedrolex 2.1"""
    options = {"fedrolex": {"direction": direction, "step": step}}
    plain = Federation(simulate(0, extract="fedrolex", aggregate="overlap", set=options, **UNEQUAL))
    sign = 1 if direction == "forward" else -1

    def one_round(state, r):
        start = sign * step * (r - 1)
        rolled = [tuple((start + u) % n for u, n in zip(leading(w), HIDDEN, strict=True)) for w in WIDTHS]
        return mean(state, slices(plain, state, r, rolled))

    plain.follow(one_round, rounds=3)


@pytest.mark.parametrize(
    ("extract", "wrap"),
    [("heterofl", ("scaler", "maskloss")), ("heterofl", ("maskloss", "scaler")), ("fedrolex", ("scaler", "maskloss"))],
)
def test_as_published_with_scaler_masked_loss_and_head_rows(simulate, extract, wrap):
    """spec heterofl 2.3, 2.5, 2.6; spec fedrolex 2.3, 2.4: the same around the rolling window"""
    values = {**UNEQUAL, "alpha": 0.1, "levels": "1,0.5,0.5"}
    plain = Federation(simulate(0, extract=extract, aggregate="overlap", wrap=wrap, **values))
    assert any(not bool(held.all()) for held in plain.classes)
    widths = (1.0, 0.5, 0.5)

    def loss(c):
        return lambda w, x, y: F.cross_entropy(torch.where(plain.classes[c], forward(w, x, widths[c]), 0.0), y)

    def one_round(state, r):
        start = r - 1 if extract == "fedrolex" else 0
        units = [tuple((start + u) % n for u, n in zip(leading(w), HIDDEN, strict=True)) for w in widths]
        pasted = slices(plain, state, r, units, loss)
        for held, (_, cover) in zip(plain.classes, pasted, strict=True):
            cover["5.weight"] *= held[:, None]
            cover["5.bias"] *= held
        return mean(state, pasted)

    plain.follow(one_round, rounds=3)


@pytest.mark.parametrize("shared", [False, True])
def test_federated_dropout(simulate, shared):
    """spec fedrolex 1: random channels, drawn anew every round"""
    plain = Federation(simulate(0, extract="feddropout", aggregate="overlap", set={"feddropout": {"shared": shared}}, **UNEQUAL))

    def one_round(state, r):
        units = []
        for c in plain.clients:
            draws = plain.stream("dropout", r, -1 if shared else c)
            orders = [torch.randperm(n, generator=draws) for n in HIDDEN]
            units.append(tuple(order[: len(u)] for order, u in zip(orders, leading(WIDTHS[c]), strict=True)))
        return mean(state, slices(plain, state, r, units))

    plain.follow(one_round)


@pytest.mark.parametrize("distil", [False, True])
def test_fjord(simulate, distil):
    """Each batch runs a width drawn among those up to the client's own; with distillation its own teaches the narrower."""
    options = {"fjord": {"ratios": [0.25, 0.5, 1.0], "distill": distil}}
    plain = Federation(simulate(0, extract="fjord", aggregate="overlap", set=options, **UNEQUAL))

    def loss(c, r):
        draws, widths = plain.stream("fjord", r, c), [w for w in (0.25, 0.5, 1.0) if w <= WIDTHS[c]]

        def of_batch(w, x, y):
            narrow = forward(cut(w, leading(widths[int(torch.randint(len(widths), (1,), generator=draws))])), x)
            if not distil:
                return F.cross_entropy(narrow, y)
            wide = forward(w, x)
            return F.cross_entropy(wide, y) + F.cross_entropy(narrow, y) + kl(narrow, wide.detach())

        return of_batch

    plain.follow(lambda state, r: mean(state, slices(plain, state, r, [leading(w) for w in WIDTHS], lambda c: loss(c, r))))


@pytest.mark.parametrize("steps", [0, 20])
def test_splitmix(simulate, steps):
    """each base is a network with a loss of its own, but for the head's bias, which all share; the model is their mean"""
    values = {**UNEQUAL, "model_args": {"hidden": [9, 6]}, "levels": "1,0.67,0.2", "server_batch_size": 8}
    values["set"] = {"splitmix": {"bases": 3, "first_steps": steps}}
    plain = Federation(simulate(0, extract="splitmix", aggregate="overlap", **values))
    groups = [(torch.arange(3 * b, 3 * b + 3), torch.arange(2 * b, 2 * b + 2)) for b in range(3)]
    before, own, seen = plain.made.pretrained, 3**0.5, set()
    for a, b in groups:
        assert torch.allclose(plain.first["3.weight"][b][:, a], own * before["3.weight"][b][:, a])
    assert plain.first["3.weight"].count_nonzero() == before["3.weight"].numel() / 3
    assert torch.allclose(plain.first["5.weight"], before["5.weight"] / own)

    def base(state, b):
        return cut({**state, "5.weight": 3 * state["5.weight"]}, groups[b])

    def on_the_server(state):
        pasted = []
        for b in range(3):
            rows = plain.cycle(len(plain.x), 8, steps, "splitmix", 1, b)
            judge = lambda w: cross_entropy(w, plain.held_x, plain.held_y)  # noqa: E731
            loss = lambda w, at: cross_entropy(w, plain.x[at], plain.y[at])  # noqa: E731
            own = tune(base(state, b), judge, loss, rows, plain.options.server_lr)
            pasted.append(paste({**own, "5.weight": own["5.weight"] / 3}, groups[b], state))
        return mean(state, pasted)

    def one_round(state, r):
        state = on_the_server(state) if r == 1 else state
        turns, pasted = torch.randperm(3, generator=plain.stream("splitmix", r)).tolist(), []
        for c, number in zip(plain.clients, (3, 2, 1), strict=True):
            rest = [b for b in torch.randperm(3, generator=plain.stream("splitmix", r, c)).tolist() if b != turns[c]]
            held = [turns[c], *rest][:number]
            seen.add((c, *sorted(held)))
            bases = {b: base(state, b) for b in held}
            flat = {f"{b}/{n}": t for b, w in bases.items() for n, t in w.items() if n != "5.bias"} | {"5.bias": state["5.bias"]}

            def loss(w, x, y, held=held):
                each = [{n.split("/")[1]: t for n, t in w.items() if n.startswith(f"{b}/")} | {"5.bias": w["5.bias"]} for b in held]
                return sum(F.cross_entropy(forward(own, x), y) for own in each)

            trained = descend(flat, plain.batches(c, r), loss)
            parts = [paste({n: trained.get(f"{b}/{n}", trained["5.bias"]) for n in bases[b]}, groups[b], state) for b in held]
            total = {n: sum(values[n] * (n != "5.bias" or i == 0) for i, (values, _) in enumerate(parts)) for n in state}
            cover = {n: sum(cover[n] for _, cover in parts).clamp(max=1) for n in state}
            pasted.append(({**total, "5.weight": total["5.weight"] / 3}, cover))
        return mean(state, pasted)

    plain.follow(one_round, rounds=3)
    assert len({held for held in seen if held[0] == 2}) > 1
    x, _ = plain.examples(0)
    for assignment in plain.made.last.assignments.values():  # what a client is sent answers with the mean of its bases
        plan, state = assignment.plan, plain.made.server.state
        each = [forward(base(state, b), x) for b in plan.bases]
        assert torch.allclose(plain.made.server.logits(plan.take(state), x, plan.sizes), torch.stack(each).mean(0), atol=1e-5)


@pytest.mark.parametrize("layers", [1, 2])
def test_lg_fedavg(simulate, layers):
    """spec baselines 1, 2: the last layers are averaged, the others stay with their client"""
    plain = Federation(simulate(0, extract="lgfedavg", aggregate="overlap", set={"lgfedavg": {"layers": layers}}, **UNEQUAL))
    shared = [n for n in plain.first if n[0] in ("5", "53")[layers - 1]]
    home = [cut(plain.first, leading(w)) for w in WIDTHS]

    def one_round(state, r):
        for c in plain.clients:
            sent = cut(state, leading(WIDTHS[c]))
            home[c] = descend({**home[c], **{n: sent[n] for n in shared}}, plain.batches(c, r), cross_entropy)
        merged = mean(state, [paste(w, leading(v), state) for w, v in zip(home, WIDTHS, strict=True)])
        return {n: merged[n] if n in shared else t for n, t in state.items()}

    plain.follow(one_round)


def test_fedavg_of_the_whole_model(simulate):
    """spec baselines 1"""
    plain = Federation(simulate(0, extract="full", aggregate="fedavg", **UNEQUAL))
    plain.follow(lambda state, r: mean(state, slices(plain, state, r, [leading(1)] * 3), plain.sizes))


def test_fedavg_of_slices_lets_absentees_vote_for_the_old_value(simulate):
    plain = Federation(simulate(0, extract="heterofl", aggregate="fedavg", **UNEQUAL))

    def one_round(state, r):
        pasted = slices(plain, state, r, [leading(w) for w in WIDTHS])
        filled = [{n: torch.where(cover[n] > 0, values[n], state[n]) for n in state} for values, cover in pasted]
        return {n: sum(k * w[n] for k, w in zip(plain.sizes, filled, strict=True)) / sum(plain.sizes) for n in state}

    plain.follow(one_round)


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_clusters(simulate, weighting):
    """spec dac 1 iv, O5: a mean within each level, from that level's own model"""
    values = {**UNEQUAL, "levels": "1,0.5,0.5", "set": {"cluster": {"weighting": weighting}}}
    plain = Federation(simulate(0, extract="heterofl", aggregate="cluster", **values))
    models, members = {}, {1.0: [0], 0.5: [1, 2]}

    def one_round(state, r):
        pasted, votes = [], plain.sizes if weighting == "samples" else [1.0] * 3
        for width, clients in members.items():
            model, units = models.get(width, state), leading(width)
            ours = [paste(descend(cut(model, units), plain.batches(c, r), cross_entropy), units, state) for c in clients]
            models[width] = mean(model, ours, [votes[c] for c in clients])
            pasted += ours
        return mean(state, pasted, votes)

    plain.follow(one_round)


@pytest.mark.parametrize(
    ("aggregate", "options"),
    [("median", {}), ("trimmed-mean", {"trim": 0.4}), ("median", {"least": 3}), ("trimmed-mean", {"trim": 0.34, "least": 5})],
)
def test_median_and_trimmed_mean(simulate, aggregate, options):
    """Yin et al.: of the n covering clients floor(trim n) are left out at either end, at least one stays."""
    values = {**UNEQUAL, "levels": "1,1,0.5"}
    plain = Federation(simulate(0, extract="heterofl", aggregate=aggregate, set={aggregate: options}, **values))

    def middle(old, held):
        if not held:
            return old
        ordered = sorted([*held, *[old] * (options.get("least", 1) - len(held))])
        left_out = min(int(options.get("trim", 0.5) * len(ordered)), (len(ordered) - 1) // 2)
        inner = ordered[left_out : len(ordered) - left_out]
        return sum(inner) / len(inner)

    def one_round(state, r):
        pasted, found = slices(plain, state, r, [leading(w) for w in (1, 1, 0.5)]), {}
        for n, old in state.items():
            entries = zip(old.flatten(), *(zip(v[n].flatten(), c[n].flatten(), strict=True) for v, c in pasted), strict=True)
            new = [middle(before, [v for v, covered in ours if covered]) for before, *ours in entries]
            found[n] = torch.stack(new).reshape(old.shape)
        return found

    plain.follow(one_round)


MANY = {**UNEQUAL, "clients": 7, "levels": "1:2,0.5:3,0.25:2", "server_data": 0.2}
MANY_WIDTHS = (1, 1, 0.5, 0.5, 0.5, 0.25, 0.25)


def distance(one, other):
    """Mean squared difference of two pasted clients where both hold the model."""
    pairs = [(a[n], b[n], (c[n] * d[n]) > 0) for (a, c), (b, d) in [(one, other)] for n in a]
    return sum(float((a - b)[both].square().sum()) for a, b, both in pairs) / sum(int(both.sum()) for *_, both in pairs)


def test_multi_krum(simulate):
    """Blanchard et al. 2017: the n - f clients with the lowest sums over their n - f - 2 nearest, distances on common entries."""
    plain = Federation(simulate(0, extract="heterofl", aggregate="krum", set={"krum": {"attackers": 2}}, **MANY))
    left_out = []

    def one_round(state, r):
        pasted = slices(plain, state, r, [leading(w) for w in MANY_WIDTHS])
        scores = [sum(sorted(distance(p, q) for q in pasted if q is not p)[:3]) for p in pasted]
        worst = sorted(range(7), key=lambda k: scores[k])[5:]
        left_out.append(worst)
        merged = mean(state, [p for k, p in enumerate(pasted) if k not in worst])
        return {n: torch.where(sum(c[n] for _, c in pasted) > 2, t, state[n]) for n, t in merged.items()}

    plain.follow(one_round)
    assert all(len(worst) == 2 for worst in left_out)


@pytest.mark.parametrize("least", [0, 5])
def test_geometric_median(simulate, least):
    """Pillutla et al. 2022: Weiszfeld steps with weights 1 / distance, the distance on what a client holds."""
    options = {"geomedian": {"steps": 3, "least": least}}
    plain = Federation(simulate(0, extract="heterofl", aggregate="geomedian", set=options, **MANY))

    def middle(state, pasted, weights):
        found, floor = {}, least * sum(weights) / 7
        for n, old in state.items():
            top = sum(w * c[n] * (v[n] - old) for w, (v, c) in zip(weights, pasted, strict=True))
            count = sum(w * c[n] for w, (_, c) in zip(weights, pasted, strict=True))
            found[n] = torch.where(count > floor / 2, old + top / count.clamp(min=max(floor, 1e-12)), old)
        return found

    def one_round(state, r):
        pasted, weights = slices(plain, state, r, [leading(w) for w in MANY_WIDTHS]), [1.0] * 7
        for _ in range(3):
            now = middle(state, pasted, weights)
            held = [torch.cat([(v[n] - now[n])[c[n] > 0] for n in now]) for v, c in pasted]
            weights = [1 / float(t.square().mean().sqrt()) for t in held]
        return middle(state, pasted, weights)

    plain.follow(one_round)
