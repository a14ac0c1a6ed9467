"""ScaleFL against its spec's oracles and properties."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from helpers.oracles import T, close, over, update
from helpers.states import same
from hetfl.aggregation.mean import mean
from hetfl.aggregation.updates import Updates
from hetfl.models.early_exit import all_exits
from hetfl.plugins.methods import scalefl
from hetfl.submodel.widths import prefix

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


@pytest.mark.parametrize("budget", [0.02, 0.06, 0.1, 0.25, 0.5, 0.81, 0.97])
@pytest.mark.parametrize("price", [lambda h, s: h / 4 * s * s, lambda h, s: (h / 4) ** 2 * (0.2 * s + 0.8 * s * s)])
def test_scale_split(budget, price):
    """spec scalefl O6: of all splits within a tenth of the budget, that of the least |depth - width|"""
    assert scalefl.split_budget(1.0, 4, price) == (4, 1.0)
    depth, width = scalefl.split_budget(budget, 4, price)
    assert abs(price(depth, width) / budget - 1) <= 0.1
    tried = [(h, k / 10_000) for h in (1, 2, 3, 4) for k in range(1, 10_001)]
    near = [abs(h / 4 - s) for h, s in tried if abs(price(h, s) / budget - 1) <= 0.1]
    assert abs(depth / 4 - width) <= min(near) + 1 / 128


def test_scale_split_without_slack_stays_below_the_budget():
    cost = lambda h, s: h / 4 * s * s  # noqa: E731
    for budget in (0.03, 0.25, 0.6):
        found = scalefl.split_budget(budget, 4, cost, slack=0)
        nearest = max(cost(h, k / 128) for h in (1, 2, 3, 4) for k in range(1, 129) if cost(h, k / 128) <= budget)
        assert cost(*found) == nearest
    assert scalefl.split_budget(1e-9, 4, cost) == (1, 1 / 128)


def test_deep_exits_stay_when_only_shallow_clients_train(simulate):
    """spec scalefl O5"""
    made = simulate(extract="scalefl", aggregate="overlap", levels="0.5", model="fedconv-cnn", model_args={})
    depth = made.last.assignments[0].plan.depth.exits
    deeper = set(made.server.state) - made.server.builder.model.names(depth)
    assert deeper
    assert all(torch.equal(made.server.state[n], made.state.initial[n]) for n in deeper)
    assert not same(made.server.state, made.state.initial)
    with all_exits(made.server.builder.module()):
        pass


def test_heads_have_as_many_convolutions_as_asked_for(simulate):
    for convs in (0, 2):
        options = {"scalefl": {"exits": 2, "convs": convs}}
        made = simulate(0, extract="scalefl", aggregate="overlap", model="cnn", model_args={"widths": [4, 4]}, set=options)
        heads = [m for name, m in made.server.builder.model.named_modules() if name.startswith("heads")]
        assert sum(isinstance(m, torch.nn.Conv2d) for m in heads) == convs
