"""The numeric oracles and properties of the specs of FIARSE, DAC, LotteryFL, Hermes, TailorFL, FedMD, ScaleFL and the baselines."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from hetfl.aggregation.mean import mean, mean_with_absent
from hetfl.aggregation.updates import Update, Updates
from hetfl.config import resolve
from hetfl.hooks.manager import PluginManager
from hetfl.hooks.server import Server
from hetfl.hooks.values import Client
from hetfl.models.early_exit import every, with_exits
from hetfl.models.state import tensors
from hetfl.models.zoo import MLP, FedConvCNN, MobileNetV2
from hetfl.plugins.aggregations import cluster, robust
from hetfl.plugins.aggregations.fedavg import FedAvg
from hetfl.plugins.aggregations.overlap import Overlap
from hetfl.plugins.methods import dac, fedmd, fiarse, hermes, lgfedavg, lotteryfl, scalefl, tailorfl
from hetfl.plugins.methods.pruning import prune_share
from hetfl.profiling import cost as cost_
from hetfl.profiling.node import Profile
from hetfl.submodel.plan import Patch, Selection, grow, prefix
from hetfl.submodel.slicing import build
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.units import gated, readers
from hetfl.submodel.widths import within
from hetfl.training.local import descend

quick = settings(deadline=None, max_examples=25)

T = torch.tensor


def close(a, b, within=1e-6):
    return torch.allclose(torch.as_tensor(a, dtype=torch.float32), torch.as_tensor(b, dtype=torch.float32), atol=within, rtol=0)


def update(client, values, weight=1.0, mask=None, index=None):
    where = {} if index is None else index
    return Update(client, {"v": Patch(T(values), where, None if mask is None else T(mask, dtype=torch.bool))}, weight)


def over(old, *updates):
    return Updates(list(updates), {"v": T(old)})


class Double(SimpleNamespace):
    branch = Server.branch


def server_with(widths=None, **clients):
    """A server as an aggregation sees it: client i at the width given as c<i>."""
    known = {int(name[1:]): Client(int(name[1:]), Profile(width)) for name, width in clients.items()}
    return Double(clients=known, branches={}, state=None, widths=widths)


def merged(plugin, updates, server=None):
    """What an aggregation plugin makes of `updates`, whether it takes them together or one by one."""
    server = server or server_with()
    server.state = updates.old
    return PluginManager({"aggregate.it": plugin}).aggregate(server, updates, 1)


def schedule(rate, target, clamp=False):
    """The nominal remaining shares of a client that prunes while more than `target` remains."""
    now = 1.0
    while now > target:
        now = prune_share(now, rate, target, clamp)
        yield now


W = T([0.9, -0.5, 0.3, -0.2, 0.1, 0.05])


def test_fiarse_mask():
    """spec fiarse O1"""
    theta = fiarse.find_thresholds({"w": W}, 0.5, False)
    assert theta["w"] == T(0.3)
    assert fiarse.make_masks({"w": W}, theta)["w"].tolist() == [True, True, True, False, False, False]


def test_fiarse_bias_factor():
    """spec fiarse O2, O5"""
    assert close(fiarse.gradient_factor(W, T(0.3)), [1.375, 1.46875, 1.5, 0, 0, 0])
    assert close(fiarse.gradient_factor(T([1.0, 2, 3, 9]), T(1.0)), [1.5, 1.4444444, 1.375, 1.18])
    assert close(fiarse.gradient_factor(T([0.0, 1, -2]), T(0.0)), [1, 1, 1])


def test_fiarse_step_and_shrinking_mask():
    """spec fiarse O3"""
    w = W.clone().requires_grad_()
    (0.5 * (fiarse.apply_threshold(w, T(0.3)) - 1).square()).sum().backward()
    assert close(w.grad, [-0.1375, -2.203125, -1.05, 0, 0, 0])
    after = (w - 0.1 * w.grad).detach().requires_grad_()
    assert close(after, [0.91375, -0.2796875, 0.405, -0.2, 0.1, 0.05])
    (0.5 * (fiarse.apply_threshold(after, T(0.3)) - 1).square()).sum().backward()
    assert (after.grad != 0).tolist() == [True, False, True, False, False, False]


def test_fiarse_aggregation():
    """spec fiarse O4: a kept entry with zero change is covered, which the official code gets wrong (5.2)"""
    x = T([0.9, -0.5, 0.3, -0.2])
    one = update(1, (x - T([0.1, -0.1, 0.2, 0.4])).tolist(), mask=[1, 1, 1, 1])
    two = update(2, (x - T([0.3, 0, 0, 0])).tolist(), mask=[1, 0, 0, 0])
    assert close(merged(fiarse.FIARSEMean(), over(x.tolist(), one, two)).state["v"], [0.7, -0.4, 0.1, -0.6])
    still = update(2, (x - T([0.3, 0, 0, 0])).tolist(), mask=[1, 1, 0, 0])
    assert close(merged(fiarse.FIARSEMean(), over(x.tolist(), one, still)).state["v"], [0.7, -0.45, 0.1, -0.6])
    assert close(merged(fiarse.FIARSEMean(rate=0.5), over(x.tolist(), one, two)).state["v"], [0.8, -0.45, 0.2, -0.4])


@quick
@given(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.1, 10), st.integers(0, 99))
def test_fiarse_masks_nest_and_do_not_depend_on_scale(a, b, scale, seed):
    """spec fiarse properties"""
    weights = {n: torch.randn(s, generator=torch.Generator().manual_seed(seed)) for n, s in (("a.w", (7, 5)), ("b.w", (11,)))}
    small, large = sorted((a, b))
    for stages in (False, True):
        inner, outer, scaled = (
            fiarse.make_masks(w, fiarse.find_thresholds(w, gamma, stages))
            for w, gamma in ((weights, small), (weights, large), ({n: t * scale for n, t in weights.items()}, small))
        )
        assert all(bool((outer[n] | ~inner[n]).all()) and torch.equal(inner[n], scaled[n]) for n in weights)
    kept = sum(int(m.sum()) for m in fiarse.make_masks(weights, fiarse.find_thresholds(weights, small, False)).values())
    assert kept == max(1, int(small * 46 + 1e-9))
    bias = fiarse.gradient_factor(weights["a.w"], T(0.3))
    assert bool(((bias == 0) | ((bias > 1) & (bias <= 1.5))).all())


def test_dac_entropy():
    """spec dac O1"""
    for gates, value in (((0.0, 0.0), 0.693147), ((1.0, 1.0), 0.693147), ((1.0, 0.0), 0.582203), ((5.0, 0.0), 0.040180)):
        assert close(dac.entropy({"g": T(gates)}), value)
    w = T([1.0, 0.0]).requires_grad_()
    dac.entropy({"g": w}).backward()
    assert close(w.grad, [-0.196612, 0.196612])
    assert close(dac.entropy({"g": T([0.3, 0.9])}), dac.entropy({"g": T([1.3, 1.9])}))


def test_dac_bound():
    """spec dac O2: the hinge that eq. 2 means, not the one it prints"""
    w = T([1.5, -0.2, 0.5]).requires_grad_()
    loss = dac.hinge({"g": w})
    loss.backward()
    assert close(loss, 0.7)
    assert w.grad.tolist() == [1, -1, 0]
    assert dac.hinge({"g": T([0.0, 1.0, 0.4])}) == 0


def test_dac_prune():
    """spec dac O3"""
    assert dac.prune_gates({"g": T([0.1, 0.1000001, 0.05, 0.9])}, 0.1, 0.1)["g"].tolist() == [1, 3]
    assert dac.prune_gates({"g": T([0.01, 0.05, 0.02])}, 0.1, 0.1)["g"].tolist() == [1]
    assert dac.prune_gates({"g": T([0.5, 0.3, 0.9, 0.7])}, 0.1, 0.25)["g"].tolist() == [0, 2, 3]


class Inverted(nn.Module):
    """An inverted residual block of a = b = 4 channels and h = 8, and a classifier that is not counted."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4),
        )  # fmt: skip

    def forward(self, x):
        return (x + self.block(x)).mean((2, 3))


def test_dac_costs():
    """spec dac O4"""
    model = Inverted().eval()
    widths = trace(model, torch.randn(2, 4, 8, 8))
    x = torch.randn(1, 4, 8, 8)
    hidden = next(g.name for g in widths.groups if g.size == 8)

    def prices(h):
        small = build(widths, model, {g.name: torch.arange(h if g.name == hidden else g.size) for g in widths.groups})
        conv = sum(p.numel() for p in small.parameters() if p.ndim > 1)
        return conv, cost_.parameters(small) - conv, cost_.macs(small, x)

    assert prices(8) == (136, 40, 8704)
    assert prices(6) == (102, 32, 6528)


def test_dac_gates_stand_before_the_depthwise_filter_and_fold():
    """spec dac O6; channels of residual sums have no gate"""
    torch.manual_seed(0)
    model = MobileNetV2(10, 3, 8).eval()
    widths = trace(model, torch.randn(2, 3, 8, 8))
    places = dac.place_gates(widths, model)
    deep = [place for (place,) in places.values() if place[1] == 0]
    assert len(deep) == 17
    assert len(places) == 20  # and before the classifier, and on two block outputs that only the next block reads
    state = tensors(model)
    gates = {g.name: torch.rand(g.size) + 0.2 for g in widths.groups if g.name in places}
    folded = {**state, **gated(state, gates, readers(widths, places))}
    x = torch.randn(2, 3, 8, 8)
    whole = torch.func.functional_call(model, folded, (x,))
    hooks = [gate_before(model, place[0], gates[group]) for group, (place,) in places.items()]
    assert close(model(x), whole.detach(), 1e-5)
    for hook in hooks:
        hook.remove()


def gate_before(model, name, gate):
    layer = model.get_submodule(name.removesuffix(".weight"))
    return layer.register_forward_pre_hook(lambda m, args: args[0] * gate.reshape(1, -1, *[1] * (args[0].ndim - 2)))


def test_dac_gates_of_a_plain_net():
    widths = trace(CNN, torch.randn(2, 1, 8, 8))
    assert set(dac.place_gates(widths, CNN)) == {g.name for g in widths.groups}


def test_dac_clusters_are_isolated():
    """spec dac O5"""
    server = server_with(c1=0.5, c2=0.5, c3=1.0)
    server.state = {"v": T([0.0])}
    for weighting, value in (("samples", 2.5), ("uniform", 2.0)):
        plugin = cluster.Cluster(weighting=weighting)
        merged = plugin.aggregate(server, over([0.0], update(1, [1.0], 10.0), update(2, [3.0], 30.0), update(3, [7.0], 5.0)))
        assert close(merged.branches["level 0.5"]["v"].values, [value])
        assert close(merged.branches["level 1"]["v"].values, [7.0])
        other = plugin.aggregate(server, over([0.0], update(1, [9.0], 10.0), update(2, [3.0], 30.0), update(3, [7.0], 5.0)))
        assert torch.equal(other.branches["level 1"]["v"].values, merged.branches["level 1"]["v"].values)
    server.branches = merged.branches
    assert close(plugin.base_state(server, server.clients[1])["v"], [2.0])


def test_lottery_prune():
    """spec lotteryfl O1"""
    w = T([0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.9, -1.0])
    once = lotteryfl.prune_smallest(w, None, 0.2)
    assert once.sum() == 8
    twice = lotteryfl.prune_smallest(w * once, once, 0.2)
    assert twice.sum() == 6
    assert bool((once | ~twice).all())


def test_lottery_ties_survive():
    assert lotteryfl.prune_smallest(torch.ones(10), None, 0.2).all()


def test_lottery_schedule():
    """spec lotteryfl O2"""
    for target, prunes, end in ((0.1, 11, 0.085899), (0.5, 4, 0.4096), (0.3, 6, 0.262144)):
        left = list(schedule(0.2, target))
        assert len(left) == prunes
        assert left[-1] == pytest.approx(end, abs=1e-6)


def test_lottery_aggregation():
    """spec lotteryfl O3"""
    updates = over([9.0, 9, 9], update(1, [1.0, 2, 0], mask=[1, 1, 0]), update(2, [3.0, 0, 0], mask=[1, 0, 0]))
    assert mean(updates, [1.0, 1.0])["v"].tolist() == [2, 2, 9]
    assert mean(over([5.0], update(1, [1.0]), update(2, [3.0])), [1.0, 1.0])["v"].tolist() == [2]


def test_hermes_figure_5():
    """spec hermes O1"""
    i = T([[1.6, -0.4, 1.2], [2.5, 0.8, 0.4], [3.2, 0.1, 0.6]])
    j = T([[2.4, 1.4, 1.8], [0.5, 0.8, -1.6], [-0.8, 0.3, 0.4]])
    only = T([[7.0, 8, 9]] * 3)
    one = Update(1, {"v": Patch(torch.stack([i, only]), {0: T([0, 2])})}, 1.0)
    two = Update(2, {"v": Patch(j[None], {0: T([0])})}, 1.0)
    server = server_with(c1=1.0, c2=1.0)
    merged = hermes.HermesMean().aggregate(server, Updates([one, two], {"v": torch.zeros(3, 3, 3)}))
    both = T([[2, 0.5, 1.5], [1.5, 0.8, -0.6], [1.2, 0.2, 0.5]])
    first, second = (grow(merged.branches[f"client {c}"], {"v": torch.zeros(3, 3, 3)})[0]["v"] for c in (1, 2))
    assert close(first[0], both)
    assert close(second[0], both)
    assert close(first[2], only)
    assert not first[1].any()
    assert not second[1:].any()


def test_hermes_lasso():
    """spec hermes O2, O3"""
    assert close(hermes.lasso(T([[3.0, 4], [0, 0], [1, 0]])), 13.162278, 1e-5)
    w = torch.zeros(2, 2, 1, 2)
    w[0, 0, 0], w[1, 1, 0] = T([3.0, 4]), T([5.0, 12])
    assert close(hermes.lasso(w), 36)
    w[0, 1, 0] = T([0.0, 12])
    assert close(hermes.lasso(w), 48.691806, 1e-5)
    zero = torch.zeros(3, 2, requires_grad=True)
    hermes.lasso(zero).backward()
    assert zero.grad.eq(0).all()


def test_hermes_schedule():
    """spec hermes O4"""
    assert list(schedule(0.2, 0.3, clamp=True)) == pytest.approx([0.8, 0.64, 0.512, 0.4096, 0.32768, 0.3])
    assert list(schedule(0.2, 0.3))[-1] == pytest.approx(0.262144)


def test_hermes_disjoint_and_identical_masks():
    """spec hermes O5"""
    server = server_with(c1=1.0, c2=1.0)
    apart = [update(1, [1.0, 0], mask=[1, 0]), update(2, [0.0, 5], mask=[0, 1])]
    merged = hermes.HermesMean().aggregate(server, over([9.0, 9], *apart))
    assert [grow(merged.branches[f"client {c}"], {"v": T([0.0, 0])})[0]["v"][c - 1].item() for c in (1, 2)] == [1, 5]
    same = hermes.HermesMean(weighting="samples").aggregate(server, over([9.0], update(1, [1.0], 10.0), update(2, [3.0], 30.0)))
    assert same.state["v"].tolist() == [2.5]
    assert all(branch["v"].values.tolist() == [2.5] for branch in same.branches.values())
    three = [update(1, [1.0]), update(2, [3.0]), update(3, [0.0], mask=[0])]
    every_one = hermes.HermesMean(overlap="all").aggregate(server, over([9.0], *three))
    assert every_one.branches["client 1"]["v"].values.tolist() == [1]


def test_tailor_ratio():
    """spec tailorfl O1: capacity is the width squared"""
    found = [tailorfl.ratio(capacity**0.5, 1 / 16) for capacity in (1, 0.5, 0.25, 0.1, 1 / 64)]
    assert found == [1, 0.6875, 0.5, 0.3125, 0.125]


def test_tailor_similarity():
    """spec tailorfl O2"""
    a, b = T([1, 0.5, 0.2, 0.1]), T([0.9, 0.6, 0.1, 0.2])
    alike = tailorfl.similarities(torch.stack([a, b, 1 - a, torch.ones(4)]))
    assert alike[0, 1].item() == pytest.approx(0.959353, abs=1e-6)
    assert alike[0, 2].item() == pytest.approx(-1)
    assert alike[3].tolist() == [0, 0, 0, 1]


def test_tailor_scaling_round_trip():
    """spec tailorfl O3"""
    kept = WIDTHS.select(lambda n: torch.arange(max(1, int(n * 0.6875))))
    plan = tailorfl.ScaledSelection(WIDTHS, kept, p=0.6875)
    small = plan.take(STATE)
    assert any(not torch.equal(small[n], Selection(WIDTHS, kept).take(STATE)[n]) for n in small)
    full, cover = grow(plan.put(small), {n: t + 1 for n, t in STATE.items()})
    assert all(close(full[n], torch.where(cover[n] > 0, t, t + 1)) for n, t in STATE.items())


def test_tailor_weighted_overlap():
    """spec tailorfl O4"""
    server = server_with(c1=0.5, c2=1.0)
    a, b = update(1, [2.0, 2, 0], 10.0, mask=[1, 1, 0]), update(2, [5.0, 0, 0], 20.0, mask=[1, 0, 0])
    assert merged(tailorfl.TailorFLMean(), over([9.0, 9, 9], a, b), server).state["v"].tolist() == [3.5, 2, 9]


def test_tailor_swap():
    """spec tailorfl O5"""
    lists = [T([0, 1]), T([2, 3])]
    assert tailorfl.swap_filters(0, lists, T([1.0, 1.0]), 4, 0.05).tolist() == [1, 2]
    assert tailorfl.swap_filters(0, lists, T([1.0, -1.0]), 4, 0.05).tolist() == [0, 1]
    assert tailorfl.swap_filters(0, [T([0, 1, 2, 3]), T([2, 3])], T([1.0, 1.0]), 4, 0.5).tolist() == [0, 1, 2, 3]


def test_tailor_regulariser():
    """spec tailorfl O6"""
    u = {"a": torch.ones(3, requires_grad=True), "b": torch.ones(1, requires_grad=True)}
    (0.5 * tailorfl.mean_square(u)).backward()
    assert close(u["a"].grad, [0.25] * 3)


SCORES = [T([[2.0, 0], [0, 1]]), T([[0.0, 2], [1, 0]]), T([[1.0, 1], [2, 2]])]


def test_fedmd_consensus():
    """spec fedmd O1, O5"""
    assert fedmd.average_scores(SCORES).tolist() == [[1, 1], [1, 1]]
    assert fedmd.average_scores(SCORES, [0.5, 0.5, 0.0]).tolist() == [[1, 1], [0.5, 0.5]]
    assert torch.equal(fedmd.average_scores(SCORES), fedmd.average_scores(SCORES[::-1]))
    assert close(fedmd.average_scores([s + 3 for s in SCORES]), fedmd.average_scores(SCORES) + 3)
    holes = [*SCORES, torch.full((2, 2), float("nan"))]
    assert torch.equal(fedmd.average_scores(holes), fedmd.average_scores(SCORES))


def test_fedmd_digest_loss():
    """spec fedmd O2, O3"""
    agreed = fedmd.average_scores(SCORES)
    assert fedmd.LOSSES["mae"](SCORES[0], agreed).item() == 0.75
    assert fedmd.LOSSES["mse"](SCORES[0], agreed).item() == 0.75
    same = SCORES[0].clone().requires_grad_()
    loss = fedmd.LOSSES["mae"](same, fedmd.average_scores([SCORES[0]] * 3))
    loss.backward()
    assert loss == 0
    assert same.grad.eq(0).all()


def test_fedmd_stratified():
    public = SimpleNamespace(y=T([0] * 30 + [1] * 10), index=torch.arange(40))
    rows = fedmd.draw_stratified(public.y, 8, torch.Generator().manual_seed(0))
    assert len(rows) == 8 == len(rows.unique())
    assert public.y[rows].bincount().tolist() == [6, 2]
    assert fedmd.draw_stratified(public.y, 100, torch.Generator()).tolist() == list(range(40))


Z = (T([[1.0, 0]]), T([[2.0, 0]]))

Y = T([0])


def test_scale_loss():
    """spec scalefl O1, O2"""
    assert close(scalefl.exit_loss(Z, Y, 0.1, 3.0, "code"), 0.190967)
    assert close(scalefl.exit_loss(Z, Y, 0.1, 3.0, "paper"), 0.096448)
    assert close(scalefl.exit_loss(Z[:1], Y, 0.0, 3.0, "code"), F.cross_entropy(Z[0], Y))
    assert close(scalefl.exit_loss(Z[:1], Y, 0.0, 3.0, "paper"), F.cross_entropy(Z[0], Y) / 2)


def test_scale_teacher_gets_no_gradient_from_distillation():
    """spec scalefl properties"""
    grads = []
    for detach in (True, False):
        early, last = (z.clone().requires_grad_() for z in Z)
        with_it = torch.autograd.grad(scalefl.exit_loss((early, last), Y, 0.1, 3.0, "code", detach), last)[0]
        early, last = (z.clone().requires_grad_() for z in Z)
        without = torch.autograd.grad(scalefl.exit_loss((early, last), Y, 0.0, 3.0, "code", detach), last)[0]
        grads.append(torch.equal(with_it, without))
    assert grads == [True, False]
    same = (Z[0], Z[0].clone())
    assert close(scalefl.exit_loss(same, Y, 0.5, 3.0, "code"), scalefl.exit_loss(same, Y, 0.0, 3.0, "code"))


def test_scale_widths():
    """spec scalefl O3: int(C s), where ours keeps the next whole unit (ceil), as every extraction here does"""
    assert [int(c * 0.75 + 1e-9) for c in (16, 32, 64)] == [len(prefix(0.75)(c)) for c in (16, 32, 64)] == [12, 24, 48]
    assert [len(prefix(0.7)(c)) for c in (16, 32, 64)] == [12, 23, 45]


def test_scale_aggregation():
    """spec scalefl O4, O5"""
    a = update(1, [[1.0]], index={0: T([0]), 1: T([0])})
    b = update(2, [[3.0, 4], [5, 6]])
    assert mean(over([[9.0, 9], [9, 9]], a, b), [1.0, 1.0])["v"].tolist() == [[2, 4], [5, 6]]
    assert mean(over([[9.0, 9], [9, 9]], a), [1.0])["v"].tolist() == [[1, 9], [9, 9]]
    deep = Updates([a], {"v": torch.full((2, 2), 9.0), "exit3": T([4.0])})
    assert mean(deep, [1.0])["exit3"].tolist() == [4]


def test_scale_split():
    """spec scalefl O6"""
    cost = lambda h, s: h / 4 * s * s  # noqa: E731
    assert scalefl.split_budget(1.0, 4, cost) == (4, 1.0)
    depth, width = scalefl.split_budget(0.25, 4, cost)
    assert abs(cost(depth, width) / 0.25 - 1) <= 0.1
    others = [(h, (0.25 * 4 / h) ** 0.5) for h in (1, 2, 3, 4)]
    assert abs(depth / 4 - width) <= min(abs(h / 4 - s) for h, s in others if s <= 1) + 0.02


def test_exits_of_a_model_end_where_they_should():
    torch.manual_seed(0)
    x = torch.randn(3, 1, 8, 8)
    model = with_exits(FedConvCNN(10, 1, 8), x, 10, 4, 1).eval()
    assert model.depth == len(model.points) + 1 >= 3
    with every(model):
        widths, logits = trace(model, x), model(x).chunk(model.depth, 1)
    assert torch.equal(logits[-1], model(x))
    for depth in range(1, model.depth + 1):
        small = model.at_depth(depth).eval()
        assert torch.equal(small(x), logits[depth - 1])
        assert set(small.state_dict()) == model.names(depth) <= set(model.state_dict())
        plan = Selection(widths, widths.select(prefix(0.5)), names=model.names(depth), depth=depth)
        narrow = build(widths, small, plan.kept)
        taken = plan.take(tensors(model))
        assert {n: t.shape for n, t in tensors(narrow).items()} == {n: t.shape for n, t in taken.items()}
        full, cover = grow(plan.put(taken), {n: t + 1 for n, t in tensors(model).items()})
        assert all(torch.equal(full[n], torch.where(cover[n] > 0, t, t + 1)) for n, t in tensors(model).items())
    assert len(model.names(1)) < len(model.names(2)) < len(model.names(model.depth))


def test_fedavg_means():
    """spec baselines O1"""
    updates = over([0.0, 0], update(1, [1.0, 2], 10.0), update(2, [3.0, 6], 30.0))
    assert mean_with_absent(updates, updates.weights)["v"].tolist() == [2.5, 5]
    assert mean_with_absent(updates, [1.0, 1.0])["v"].tolist() == [2, 4]


def test_fedavg_of_one_client_is_a_central_step():
    """spec baselines O6"""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), T([0, 1, 0, 1])
    central = copy.deepcopy(model)
    F.cross_entropy(central(x), y).backward()
    with torch.no_grad():
        for p in central.parameters():
            p -= 0.1 * p.grad
    task = SimpleNamespace(
        model=model, masks={}, draws=False, stream=lambda purpose: torch.Generator(), options=resolve({"clip": 0})
    )
    descend(task, torch.optim.SGD(model.parameters(), 0.1), [(x, y)], lambda a, b: F.cross_entropy(model(a), b))
    merged = mean_with_absent(Updates([Update(1, {n: Patch(t) for n, t in tensors(model).items()}, 4.0)], tensors(model)), [4.0])
    assert all(close(merged[n], t.detach()) for n, t in central.named_parameters())


def test_lg_counts():
    """spec baselines O3: hidden2, hidden3 and out of 784-512-256-256-128-10 are 99,978 of 633,226 parameters"""
    model = MLP(10, 1, 28, hidden=(512, 256, 256, 128))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(sizes.values()) == 633_226
    assert sum(sizes[name] for name in lgfedavg.list_last_tensors(model, 3)) == 99_978


@quick
@given(st.integers(1, 5), st.integers(0, 99))
def test_robust_means_stay_within_the_covering_clients(clients, seed):
    g = torch.Generator().manual_seed(seed)
    values, masks = torch.randn(clients, 6, generator=g), torch.rand(clients, 6, generator=g) > 0.4
    updates = over([9.0] * 6, *(update(c, v.tolist(), mask=m.tolist()) for c, (v, m) in enumerate(zip(values, masks, strict=True))))
    for plugin in (robust.Median(), robust.TrimmedMean(trim=0.25), robust.TrimmedMean(trim=0)):
        new = plugin.aggregate(updates).state["v"]
        for k in range(6):
            held = values[masks[:, k], k]
            assert (held.min() - 1e-6 <= new[k] <= held.max() + 1e-6) if len(held) else new[k] == 9
    assert close(robust.TrimmedMean(trim=0).aggregate(updates).state["v"], mean(updates, [1.0] * clients)["v"], 1e-5)
    middle = robust.Median().aggregate(over([9.0], *(update(c, [float(v)]) for c, v in enumerate((1, 100, 2))))).state["v"]
    assert middle.item() == 2


MEANS = {
    "overlap": Overlap(), "samples": Overlap(weighting="samples"), "fedavg": FedAvg(), "fiarse": fiarse.FIARSEMean(),
    "tailorfl": tailorfl.TailorFLMean(), "cluster": cluster.Cluster(), "hermes": hermes.HermesMean(), "median": robust.Median(),
    "trimmed-mean": robust.TrimmedMean(trim=0.2),
}  # fmt: skip


def call(plugin, updates):
    """The next state under an aggregation of clients 0 … 3."""
    return merged(plugin, updates, server_with(c0=1.0, c1=0.5, c2=0.25, c3=0.5)).state["v"]


@pytest.mark.parametrize("name", MEANS)
@quick
@given(st.integers(1, 4), st.integers(0, 99), st.permutations(range(4)))
def test_means_lie_between_what_they_are_of_and_know_no_order(name, clients, seed, order):
    """spec baselines, heterofl, lotteryfl, tailorfl: within [min, max], order of clients, old value where nobody covers"""
    g = torch.Generator().manual_seed(seed)
    values, masks, old = (
        torch.randn(clients, 5, generator=g),
        torch.rand(clients, 5, generator=g) > 0.4,
        torch.randn(5, generator=g),
    )
    ours = [update(c, v.tolist(), float(c + 1), m.tolist()) for c, (v, m) in enumerate(zip(values, masks, strict=True))]
    new = call(MEANS[name], over(old.tolist(), *ours))
    assert torch.equal(new, call(MEANS[name], over(old.tolist(), *[ours[i] for i in order if i < clients])))
    for k in range(5):
        held = torch.cat([values[masks[:, k], k], old[k : k + 1]]) if name == "fedavg" else values[masks[:, k], k]
        assert new[k] == old[k] if not masks[:, k].any() else held.min() - 1e-5 <= new[k] <= held.max() + 1e-5
    same = [update(c, values[0].tolist(), float(c + 1)) for c in range(clients)]
    assert close(call(MEANS[name], over(old.tolist(), *same)), values[0], 1e-5)


def test_digest_steps_bring_clients_closer_to_the_consensus():
    """spec fedmd properties: MSE on linear models with a small learning rate"""
    torch.manual_seed(0)
    clients, x = [nn.Linear(4, 3) for _ in range(3)], torch.randn(20, 4)
    agreed = fedmd.average_scores([c(x).detach() for c in clients])
    for client in clients:
        before = fedmd.LOSSES["mse"](client(x), agreed).item()
        optimizer = torch.optim.SGD(client.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            fedmd.LOSSES["mse"](client(x), agreed).backward()
            optimizer.step()
        assert fedmd.LOSSES["mse"](client(x), agreed).item() < before


torch.manual_seed(0)

CNN = FedConvCNN(10, 1, 8)

STATE, WIDTHS = tensors(CNN), trace(CNN, torch.randn(2, 1, 8, 8))


@quick
@given(st.floats(0.1, 1), st.floats(0.1, 1), st.integers(0, 9))
def test_a_plan_narrowed_by_the_client_is_the_cut_submodel(outer, inner, seed):
    """Round trip: what the server says a narrowed plan takes is what the client has after its own cut."""
    g = torch.Generator().manual_seed(seed)
    plan = Selection(WIDTHS, WIDTHS.select(lambda n: torch.randperm(n, generator=g)[: max(1, int(n * outer))]))
    sizes = plan.sizes
    kept = {name: torch.randperm(n, generator=g)[: max(1, int(n * inner))].sort().values for name, n in sizes.items()}
    index = within(WIDTHS, sizes, kept)
    sent = plan.take(STATE)
    cut = {name: t[torch.meshgrid(*[index[name].get(d, torch.arange(n)) for d, n in enumerate(t.shape)], indexing="ij")]
           if name in index else t for name, t in sent.items()}  # fmt: skip
    narrowed = plan.narrow(kept, {})
    assert narrowed.sizes == {name: len(units) for name, units in kept.items()}
    assert all(torch.equal(narrowed.take(STATE)[name], t) for name, t in cut.items())


@quick
@given(st.integers(0, 99))
def test_masked_plans_put_back_only_what_exists(seed):
    g = torch.Generator().manual_seed(seed)
    masks = {n: torch.rand(t.shape, generator=g) > 0.5 for n, t in STATE.items() if t.ndim > 1}
    plan = Selection(WIDTHS, WIDTHS.select(torch.arange), masks)
    full, cover = grow(plan.put({n: t + 2 for n, t in plan.take(STATE).items()}), STATE)
    for n, t in STATE.items():
        assert torch.equal(cover[n] > 0, masks.get(n, torch.ones(t.shape, dtype=torch.bool)))
        assert torch.equal(full[n], torch.where(cover[n] > 0, t + 2, t))
