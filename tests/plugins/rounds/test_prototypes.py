"""Rounds of the strategies whose clients exchange prototypes alone, against the same rounds in plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from helpers.faults import changed, with_bad
from helpers.oracles import close
from helpers.plain import UNEQUAL, Federation, agree, cross_entropy, cut, descend, leading
from hetfl.errors import NotApplicable
from hetfl.plugins.methods.fedproto import FedProto
from hetfl.plugins.methods.fedtgp import find_margin
from hetfl.rounds.loop import run_round
from hetfl.submodel.encoding import payload_bytes

WIDTHS, DIM = (1.0, 0.5, 0.25), 6


def features(w, x, dim=DIM):
    """The second hidden layer of the perceptron, averaged over (or repeated for) `dim` equal shares."""
    h = torch.relu(x.flatten(1) @ w["1.weight"].T + w["1.bias"])
    h = torch.relu(h @ w["3.weight"].T + w["3.bias"])
    d = h.shape[1]
    shares = [h[:, i * d // dim : math.ceil((i + 1) * d / dim)].mean(1) for i in range(dim)]
    return torch.stack(shares, 1)


class Agreeing(Federation):
    """Clients of widths 1, 0.5 and 0.25 that keep their models and agree on prototypes."""

    def __init__(self, made, weight):
        super().__init__(made)
        self.weight, self.goals = weight, {}
        self.models = [cut(self.untrained, leading(w)) for w in WIDTHS]

    def loss(self, w, x, y):
        """CE + weight * the mean squared distance from the prototype, of the examples whose class has one."""
        known = torch.tensor([int(k) in self.goals for k in y])
        goals = torch.stack([self.goals.get(int(k), torch.zeros(self.dim)) for k in y])
        apart = (features(w, x, self.dim) - goals).square().sum(1) * known
        return cross_entropy(w, x, y) + self.weight * apart.sum() / (len(y) * self.dim)

    def play(self, name, merge, dim=DIM, rounds=3):
        """The product's rounds, and each round's models, prototypes and scores; `merge` makes the goals of what was sent."""
        self.dim, plugin, scores = dim, self.made.plugins.plugins[f"aggregate.{name}"], []
        for r in range(1, rounds + 1):
            run_round(self.made.state, r, self.made.engine)
            assert not any("fault" in row for row in self.made.state.client_rows)
            homes, said = self.made.engine.client_states(), []
            for c in self.clients:
                self.models[c] = descend(self.models[c], self.batches(c, r), self.loss)
                agree(self.models[c], homes[c]["home"])
                x, y = self.examples(c)
                h = features(self.models[c], x, dim)
                said.append({int(k): (h[y == k].mean(0), int((y == k).sum())) for k in y.unique()})
            scores.append(self.score())
            self.goals = merge(said, r)
            kept = plugin.state_dict()
            assert set(self.goals) == set(kept["known"].nonzero().flatten().tolist())
            assert close(torch.stack([self.goals[k] for k in sorted(self.goals)]), kept["prototypes"][kept["known"]], 1e-4)
        found = [row.get("personal-prototype@own") for row in self.made.state.rows]
        assert found == pytest.approx(scores)
        assert all(torch.equal(t, self.first[n]) for n, t in self.made.server.state.items())
        return said

    def score(self):
        """The mean over clients of how often the nearest prototype is the right one; None before there are any."""
        if not self.goals:
            return None
        found, names = [], sorted(self.goals)
        for c in self.clients:
            x, y = self.made.federation.clients[c].test.all()
            apart = [[float((h - self.goals[k]).norm()) for k in names] for h in features(self.models[c], x, self.dim)]
            found.append(sum(names[row.index(min(row))] == int(k) for row, k in zip(apart, y, strict=True)) / len(y))
        return sum(found) / len(found)


@pytest.mark.parametrize(("weighting", "dim"), [("samples", 0), ("uniform", 4)])
def test_fedproto(simulate, weighting, dim):
    options = {"fedproto": {"weight": 3.0, "weighting": weighting, "dim": dim}}
    made = simulate(0, extract="heterofl", aggregate="fedproto", set=options, **UNEQUAL)
    plain, old = Agreeing(made, 3.0), {}

    def merge(said, r):
        for k in {k for mine in said for k in mine}:
            votes = [(h, n if weighting == "samples" else 1) for mine in said for h, n in [mine.get(k, (0, 0))] if n]
            old[k] = sum(n * h for h, n in votes) / sum(n for _, n in votes)
        return dict(old)

    said = plain.play("fedproto", merge, dim or DIM)
    up = [payload_bytes({"prototypes": torch.zeros(len(mine), dim or DIM), "counts": torch.zeros(10).long()}) for mine in said]
    down = payload_bytes({"prototypes": torch.zeros(len(old), dim or DIM), "known": torch.zeros(10).bool()})
    rows = [row for row in made.state.client_rows if row["round"] == 3]
    assert [(row["bytes up"], row["bytes down"]) for row in rows] == [(most, down) for most in up]


@pytest.mark.parametrize("most", [100.0, 0.05])
def test_fedtgp(simulate, most):
    """The official code's server: distances from what a small network makes of embeddings, the own with a margin."""
    options = {"fedtgp": {"weight": 3.0, "epochs": 3, "lr": 0.05, "batch": 4, "margin": most}}
    made = simulate(0, extract="heterofl", aggregate="fedtgp", set=options, **UNEQUAL)
    plain, margins = Agreeing(made, 3.0), []
    draws, bound = plain.stream("prototypes"), 1 / math.sqrt(DIM)
    shapes = {"v": (DIM, DIM), "v0": (DIM,), "u": (DIM, DIM), "u0": (DIM,)}
    net = {n: bound * (2 * torch.rand(shape, generator=draws) - 1) for n, shape in shapes.items()}
    net["e"] = torch.randn(10, DIM, generator=draws)

    def prototypes(w):
        return torch.relu(w["e"] @ w["v"].T + w["v0"]) @ w["u"].T + w["u0"]

    def merge(said, r):
        sent = [(h, k) for mine in said for k, (h, _) in sorted(mine.items())]
        centres = {k: torch.stack([h for h, j in sent if j == k]).mean(0) for _, k in sent}
        gaps = [min(float((a - b).norm()) for j, b in centres.items() if j != k) for k, a in centres.items()]
        margins.append(min(max(gaps), most))

        def loss(w, at, _):
            all_of_them, total = prototypes(w), 0
            for i in at.tolist():
                h, k = sent[i]
                apart = (h - all_of_them).square().sum(1).sqrt()
                total = total - torch.log_softmax(-(apart + margins[-1] * F.one_hot(torch.tensor(k), 10)), 0)[k]
            return total / len(at)

        rows = plain.cycle(len(sent), 4, 3 * math.ceil(len(sent) / 4), "prototype batches", r)
        net.update(descend(net, [(at, None) for at in rows], loss, lr=0.05, momentum=0, clip=0))
        return dict(enumerate(prototypes(net)))

    plain.play("fedtgp", merge)
    assert (max(margins) == most) == (most < 1)


def test_any_mix_of_architectures_agrees_on_prototypes(simulate):
    """A convolutional net, a perceptron and the run's own: 6 features, 64 and 12, of which each has the mean of shares."""
    models = {"fedmd": {"models": {"0.5": "cnn", "0.25": "mlp"}}}
    made = simulate(2, extract="fedmd", aggregate="fedproto", set=models, levels="1,0.5,0.25")
    assert not any("fault" in row for row in made.state.client_rows)
    assert made.plugins.plugins["aggregate.fedproto"].state_dict()["prototypes"].shape == (10, 6)
    assert len({row["bytes up"] for row in made.state.client_rows}) == 1
    assert "personal@own" in made.state.rows[-1]


def spoilt(**changed):
    return changed_extras(lambda extras: {**extras, **{name: change(extras[name]) for name, change in changed.items()}})


def changed_extras(change):
    return changed(extras=lambda reply: change(reply.extras))


SPOILT = {
    "too few": spoilt(prototypes=lambda t: t[:-1]),
    "too long": spoilt(prototypes=lambda t: torch.cat([t, t], 1)),
    "no counts": changed_extras(lambda extras: {"prototypes": extras["prototypes"]}),
    "too many": spoilt(counts=lambda t: 1000 * t),
    "negative": spoilt(counts=lambda t: -t),
    "infinite": spoilt(prototypes=lambda t: t / 0),
}


@pytest.mark.parametrize("name", SPOILT)
def test_prototypes_that_cannot_be_are_left_out(monkeypatch, name):
    made = with_bad(monkeypatch, SPOILT[name], extract="heterofl", aggregate="fedproto")
    run_round(made.state, 1, made.engine)
    faults = {row["client"]: row["fault"] for row in made.state.client_rows if "fault" in row}
    assert faults.keys() == {1}
    assert "prototypes" in faults[1] or "'counts'" in faults[1]


@pytest.mark.parametrize(
    "values", [{"extract": "full", "model": "helpers.modules:Pooled", "model_args": {}, "levels": "1"},
               {"extract": "fedmd", "set": {"fedmd": {"models": {"0.5": "helpers.modules:Pooled"}}}}]
)  # fmt: skip
def test_a_model_without_a_head_is_not_applicable(simulate, values):
    with pytest.raises(NotApplicable, match="not applicable: no layer of this Pooled"):
        simulate(1, aggregate="fedtgp", **values)


def test_a_class_that_nobody_sends_keeps_its_prototype():
    plugin = FedProto()
    plugin._known, plugin._prototypes = torch.tensor([True, False, True]), torch.tensor([[1.0], [0.0], [3.0]])
    known, found = plugin.merge(None, torch.tensor([[[5.0], [0.0], [0.0]]]), torch.tensor([[4, 0, 0]]), 1)
    assert known.tolist() == [True, False, True]
    assert found[known].tolist() == [[5.0], [3.0]]


def test_the_margin_is_that_of_the_class_furthest_from_all_others():
    prototypes = torch.tensor([[[0.0, 0], [3, 4], [9, 9]], [[0, 0], [3, 4], [0, 2]]])
    held = torch.tensor([[True, True, False], [True, True, True]])
    assert find_margin(prototypes, held) == pytest.approx(math.sqrt(13))
    assert find_margin(prototypes[:1, :1], held[:1, :1]) == math.inf


def test_prototypes_that_diverge_stay_as_they_were(simulate):
    made = simulate(0, extract="full", aggregate="fedtgp", set={"fedtgp": {"lr": 1e30}}, levels="1")
    found = run_round(made.state, 1, made.engine)
    assert "diverged" in found.row.alarms[0]
    assert not bool(made.plugins.plugins["aggregate.fedtgp"].state_dict()["known"].any())
