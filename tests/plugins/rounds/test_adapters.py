"""Two rounds of every strategy for adapters, against the same rounds in plain torch; and what FlexLoRA's means do to high ranks."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from helpers.plain import UNEQUAL, Federation, descend, mean
from hetfl import Patch, Update, Updates
from hetfl.models.adapters import Lora, list_adapters
from hetfl.plugins.adapters.flexlora import FlexLora, average_products
from hetfl.rounds.loop import run_round
from hetfl.runs.snapshot import capture
from hetfl.submodel.encoding import payload_bytes

LAYERS, RANK, SCALE, WIDTHS = ("1", "3"), 4, 2.0, (1.0, 0.5, 0.25)


class Adapted(Federation):
    """A perceptron 64-8-6-10 whose two hidden layers have adapters of rank 4, alpha 8."""

    def __init__(self, simulate, **values):
        super().__init__(simulate(0, **{**UNEQUAL, "adapter": f"lora:rank={RANK},alpha={RANK * SCALE}", **values}))
        self.base, self.changes = self.made.server.builder.base, {}

    def loss(self, w, x, y):
        h, base = x.flatten(1), self.base
        for i in LAYERS:
            a = w.get(f"{i}.lora_A.weight", base.get(f"{i}.lora_A.weight"))
            low = h @ a[: w[f"{i}.lora_B.weight"].shape[1]].T @ w[f"{i}.lora_B.weight"].T
            weight = base[f"{i}.base_layer.weight"] + self.changes.get(f"{i}.change", 0)
            h = torch.relu(h @ weight.T + base[f"{i}.base_layer.bias"] + SCALE * low)
        return F.cross_entropy(h @ w["5.weight"].T + w["5.bias"], y)

    def train(self, state, client, round, units):
        """(values, coverage) of what a client of the ranks `units` (by layer) returns."""
        places = {f"{i}.lora_A.weight": (units[i],) for i in LAYERS}
        places |= {f"{i}.lora_B.weight": (slice(None), units[i]) for i in LAYERS}
        trained = descend({n: t[places.get(n, ())] for n, t in state.items()}, self.batches(client, round), self.loss)
        values, cover = ({n: torch.zeros_like(t) for n, t in state.items()} for _ in range(2))
        for name, tensor in trained.items():
            values[name][places.get(name, ())], cover[name][places.get(name, ())] = tensor, torch.ones(())
        return values, cover


def leading(width):
    return {i: torch.arange(math.ceil(RANK * width)) for i in LAYERS}


@pytest.mark.parametrize("mode", ["prefix", "window", "random"])
def test_ranks_by_overlap(simulate, mode):
    plain = Adapted(simulate, extract="loraranks", aggregate="overlap", set={"loraranks": {"mode": mode, "step": 3}})
    groups = {i: next(g.name for g in plain.made.server.widths.groups if g.name.startswith(f"{i}.lora_A")) for i in LAYERS}

    def units(c, r):
        first = leading(WIDTHS[c])
        if mode == "window":
            return {i: (3 * (r - 1) + u) % RANK for i, u in first.items()}
        if mode == "random":
            draws = {i: torch.randperm(RANK, generator=plain.stream(f"ranks {groups[i]}", r, c)) for i in LAYERS}
            return {i: draws[i][: len(u)].sort().values for i, u in first.items()}
        return first

    plain.follow(lambda state, r: mean(state, [plain.train(state, c, r, units(c, r)) for c in plain.clients]))
    down = [row["bytes down"] for row in sorted(plain.made.state.client_rows, key=lambda row: row["client"])]
    assert down[0] > down[2] > down[4]


def products(state):
    return {i: state[f"{i}.lora_B.weight"] @ state[f"{i}.lora_A.weight"] for i in LAYERS}


def heads(state):
    return {n: t for n, t in state.items() if "lora" not in n}


@pytest.mark.parametrize("by_rank", [False, True])
def test_flexlora(simulate, by_rank):
    options = {"flexlora": {"by_rank": by_rank}}
    plain = Adapted(simulate, extract="loraranks", aggregate="flexlora", set=options)

    def one_round(state, r):
        returned = [plain.train(state, c, r, leading(WIDTHS[c])) for c in plain.clients]
        found = mean(state, returned, plain.sizes)
        for i in LAYERS:
            a, b = f"{i}.lora_A.weight", f"{i}.lora_B.weight"
            product = torch.zeros(state[b].shape[0], state[a].shape[1])
            for rank in range(RANK):
                having = [c for c in plain.clients if math.ceil(RANK * WIDTHS[c]) > rank]
                whole = sum(plain.sizes[c] for c in (having if by_rank else plain.clients))
                for c in having:
                    product += plain.sizes[c] / whole * torch.outer(returned[c][0][b][:, rank], returned[c][0][a][rank])
            _, vectors = torch.linalg.eigh(product.T @ product)
            found[a] = vectors[:, -RANK:].flip(1).T
            found[b] = product @ found[a].T
        return found

    plain.follow(one_round, seen=lambda state: heads(state) | products(state), within=2e-4)


def test_hetlora(simulate):
    plain = Adapted(simulate, extract="loraranks", aggregate="hetlora")

    def one_round(state, r):
        returned = [plain.train(state, c, r, leading(WIDTHS[c])) for c in plain.clients]
        norms = [math.sqrt(sum(float(p.square().sum()) for p in products(values).values())) for values, _ in returned]
        return {n: sum(w * v[n] for w, (v, _) in zip(norms, returned, strict=True)) / sum(norms) for n in state}

    plain.follow(one_round)


@pytest.mark.parametrize("weighting", ["samples", "uniform"])
def test_flora(simulate, weighting):
    """sum p_k B_k A_k is added to the base, times the scale; then B is 0 and A drawn anew.

    A pre-trained rank that a client lacks stays as it was in that client's product.
    """
    plain = Adapted(simulate, extract="loraranks", aggregate="flora", set={"flora": {"weighting": weighting}})
    shares = plain.sizes if weighting == "samples" else [1, 1, 1]

    def one_round(state, r):
        plain.changes = {n: SCALE * t for n, t in state.items() if "change" in n}
        trained = {n: t for n, t in state.items() if "change" not in n}
        returned = [plain.train(trained, c, r, leading(WIDTHS[c])) for c in plain.clients]
        found = {n: state[n] for n in state if "change" in n} | mean(trained, returned, shares)
        for i in LAYERS:
            a, b, product = f"{i}.lora_A.weight", f"{i}.lora_B.weight", 0
            for share, (values, cover) in zip(shares, returned, strict=True):
                whole = {n: torch.where(cover[n] > 0, values[n], state[n]) for n in (a, b)}
                product = product + share / sum(shares) * whole[b] @ whole[a]
            found[f"{i}.change"] = state[f"{i}.change"] + product
            draws = torch.rand(state[a].shape, generator=plain.stream(f"flora {a}", r))
            found[a], found[b] = (2 * draws - 1) / math.sqrt(state[a].shape[1]), torch.zeros_like(state[b])
        return {n: found[n] for n in state}

    assert float(plain.first["1.lora_B.weight"].norm()) > 0
    plain.follow(one_round)
    assert all("home" not in state for state in plain.made.engine.client_states().values()), "clients keep what they are sent"


def test_flora_sends_all_stacks_while_they_are_smaller_than_what_they_add_up_to(simulate):
    made = simulate(
        0, extract="loraranks", aggregate="flora", adapter="lora:rank=4", model_args={"hidden": [60, 40]}, pretrain_steps=0,
        levels="1,0.5,0.25", rounds=6,
    )  # fmt: skip
    first = {name: t.clone() for name, t in made.server.builder.base.items()}
    for r in range(1, 7):
        before = dict(made.server.state)
        run_round(made.state, r, made.engine)
        plan, sent = made.server.select({g.name: torch.arange(g.size) for g in made.server.widths.groups}).take(before), {}
        for name, t in plan.items():
            ranks = 7 * (r - 1)  # of 4 + 2 + 1 clients' a round
            if name.endswith("change") and ranks and ranks * sum(t.shape) < t.numel():
                sent |= {f"{name}/A": torch.zeros(ranks, t.shape[1]), f"{name}/B": torch.zeros(t.shape[0], ranks)}
            elif not name.endswith("lora_B.weight") and bool(t.any()):
                sent[name] = t
        rows = [row for row in made.state.client_rows if row["round"] == r]
        assert not any("fault" in row for row in rows)
        assert rows[0]["bytes down"] == payload_bytes(sent), r
        assert rows[0]["bytes up"] == payload_bytes({n: t for n, t in plan.items() if not n.endswith("change")})
    assert all(torch.equal(t, first[name]) for name, t in made.server.builder.base.items())
    assert ranks * 100 > 2400, "stacks were never larger"


def test_flora_of_a_convolution_is_the_convolution_of_the_changed_weight(simulate):
    made = simulate(2, extract="loraranks", aggregate="flora", model="cnn", model_args={"widths": [4, 6]},
                    adapter="lora:rank=2,alpha=6,target=conv")  # fmt: skip
    whole = made.server.builder.load(made.server.state).eval()
    layer = next(m for m in whole.modules() if isinstance(m, Lora))
    x = torch.randn(2, layer.base_layer.in_channels, 8, 8)
    assert bool(layer.change.any())
    assert not bool(layer.lora_B.weight.any())
    plain = copy.deepcopy(layer.base_layer)
    plain.weight = plain.weight + 3 * layer.change
    assert torch.allclose(layer(x), plain(x), atol=1e-5)


def test_fedsa(simulate):
    plain = Adapted(simulate, extract="loraranks", aggregate="overlap", wrap=("fedsa",))
    own = [{f"{i}.lora_B.weight": plain.untrained[f"{i}.lora_B.weight"] for i in LAYERS} for _ in plain.clients]

    def one_round(state, r):
        returned = [plain.train({**state, **own[c]}, c, r, leading(WIDTHS[c])) for c in plain.clients]
        for c, (values, _) in enumerate(returned):
            own[c] = {name: values[name] for name in own[c]}
        return {n: state[n] if n in own[0] else t for n, t in mean(state, returned).items()}

    plain.follow(one_round)


def test_ffa(simulate):
    plain = Adapted(simulate, extract="loraranks", aggregate="overlap", wrap=("ffa",))
    assert not any("lora_A" in name for name in plain.first)

    def train(state, c, r):
        units, names = leading(WIDTHS[c]), {f"{i}.lora_B.weight": i for i in LAYERS}
        small = {n: t[:, units[names[n]]] if n in names else t for n, t in state.items()}
        trained = descend(small, plain.batches(c, r), plain.loss)
        values = {n: F.pad(t, (0, RANK - t.shape[1])) if n in names else t for n, t in trained.items()}
        return values, {n: F.pad(torch.ones_like(t), (0, RANK - t.shape[1])) if n in names else torch.ones_like(t)
                        for n, t in trained.items()}  # fmt: skip

    plain.follow(lambda state, r: mean(state, [train(state, c, r) for c in plain.clients]))


def test_clients_prune_themselves_and_stay_pruned(simulate):
    options = {"loraranks": {"prune": 0.5, "penalty": 0.3}}
    made = simulate(2, extract="loraranks", set=options, adapter="lora:rank=4", levels="1", pretrain_steps=60)
    assert not any("fault" in row for row in made.state.client_rows)
    sizes = [plan.plan.sizes for plan in made.last.assignments.values()]
    ranks = [size for s in sizes for name, size in s.items() if "lora_A" in name]
    assert min(ranks) == 2, "nobody pruned in round 1"
    kept = capture(made).tensors["plugin/extract.loraranks"]
    other = type(made.plugins.plugins["extract.loraranks"])(prune=0.5)
    other.load_state_dict(kept)
    assert other._ranks == made.plugins.plugins["extract.loraranks"]._ranks != {}
    run_round(made.state, 3, made.engine)
    now = made.plugins.plugins["extract.loraranks"]._ranks
    assert all(now[c][g] <= n for c, ranks in other._ranks.items() for g, n in ranks.items())
    clients = list(made.server.clients.values())
    plans = made.plugins.extract(made.server, clients, 4)
    assert all({g: plan.sizes[g] for g in now.get(c.id, {})} == now.get(c.id, {}) for c, plan in zip(clients, plans, strict=True))


def test_who_pruned_nothing_gets_more_ranks_when_its_width_grows(simulate):
    grow = {"loraranks": {"prune": 0.5, "penalty": 0.0}, "grow": {"until": 1, "stages": 2}}
    made = simulate(2, extract="loraranks", set=grow, wrap=("grow",), adapter="lora:rank=4", levels="1", rounds=2)
    plugin = made.plugins.plugins["extract.loraranks"]
    groups = [name for name in made.server.builder.full if "lora_A" in name]
    for client, assignment in made.last.assignments.items():
        assert {assignment.plan.sizes[g] for g in groups if g not in plugin._ranks.get(client, {})} <= {4}
    assert sum(len(made.last.assignments) > 0 and g not in plugin._ranks.get(c, {}) for c in made.last.assignments for g in groups)


@pytest.mark.parametrize("by_rank", [False, True])
def test_a_rank_that_nobody_has_stays_under_the_mean_by_rank_alone(by_rank):
    """raFLoRA averages rank by rank; FlexLoRA's mean of products knows no ranks, so the missing one is gone."""
    a, b, first = torch.randn(2, 3), torch.randn(4, 2), torch.tensor([0])
    patches = {"x.lora_A.weight": Patch(2 * a[:1], {0: first}), "x.lora_B.weight": Patch(b[:, :1], {1: first})}
    old = {"x.lora_A.weight": a, "x.lora_B.weight": b}
    found = average_products(Updates([Update(0, patches, 5.0)], old), list_adapters(list(old))[0], [5.0], by_rank)
    assert torch.allclose(found, 2 * torch.outer(b[:, 0], a[0]) + by_rank * torch.outer(b[:, 1], a[1]), atol=1e-6)


def energy_beyond(product, rank):
    """The share of the squared singular values after the first `rank`."""
    squares = torch.linalg.svdvals(product).square()
    return float(squares[rank:].sum() / squares.sum())


def test_high_ranks_collapse_under_the_plain_mean_and_not_by_rank():
    """Issue 18's oracle: 16 ranks, .794 of the energy beyond the second; clients of rank 2, 4, 8, 16 that go 0.35 of the way."""
    torch.manual_seed(0)
    (u, _), (v, _) = (torch.linalg.qr(torch.randn(32, 16)) for _ in range(2))
    target = u * 0.9219 ** (torch.arange(16) / 2) @ v.T
    assert energy_beyond(target, 2) == pytest.approx(0.794, abs=2e-3)
    found = {}
    for by_rank in (False, True):
        state, shares = {"l.lora_A.weight": torch.zeros(16, 32), "l.lora_B.weight": torch.zeros(32, 16)}, []
        for _ in range(30):
            updates = []
            for client, rank in enumerate((2, 4, 8, 16)):
                a, b, units = state["l.lora_A.weight"][:rank], state["l.lora_B.weight"][:, :rank], torch.arange(rank)
                left, s, right = torch.linalg.svd(0.65 * b @ a + 0.35 * target)
                patches = {
                    "l.lora_A.weight": Patch(right[:rank], {0: units}),
                    "l.lora_B.weight": Patch(left[:, :rank] * s[:rank], {1: units}),
                }
                updates.append(Update(client, patches, 1.0))
            state = FlexLora(by_rank=by_rank).aggregate(SimpleNamespace(state=state), updates).state
            product = state["l.lora_B.weight"] @ state["l.lora_A.weight"]
            shares.append(energy_beyond(product, 2))
        found[by_rank] = shares[0], shares[-1], float((product - target).norm() / target.norm())
    assert found[False][0] > 0.45 > 0.3 > found[False][1], "the plain mean keeps high ranks"
    assert found[True][1] > 0.77
    assert found[False][2] > 0.6 > 0.4 > found[True][2]
