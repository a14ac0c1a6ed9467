"""A part of a task's model: what it answers, and what its training moves."""

from __future__ import annotations

import pytest
import torch

from helpers.tasks import make_task
from hetfl.models.state import copy_state, load_state, tensors
from hetfl.submodel.blocks import take_blocks

PARTS = {"the first half": range(4), "the second half": range(4, 8), "scattered": (1, 2, 6, 7), "in another order": (5, 0, 7, 2)}


@pytest.mark.parametrize("units", PARTS.values(), ids=PARTS)
def test_a_part_is_the_submodel_of_its_units_and_trains_the_whole_models_tensors(simulate, units):
    server = simulate(0, extract="heterofl", aggregate="overlap", model="cnn", model_args={"widths": [8, 8]}).server
    task, kept, x = make_task(server), {g.name: torch.tensor(units) for g in server.widths.groups}, torch.randn(6, 1, 8, 8)
    plan = server.select(kept)
    alone, before = server.builder.load(plan.take(server.state), plan.sizes).train(), copy_state(task.model)
    answers, expected = task.make_part(kept)(x), alone(x)
    assert torch.allclose(answers, expected, atol=1e-6)
    task.model.zero_grad()
    alone.zero_grad()
    answers.square().sum().backward()
    expected.square().sum().backward()
    gradients = take_blocks({n: p.grad for n, p in task.model.named_parameters()}, plan.cuts)
    for name, parameter in alone.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-4)
    after, own = tensors(task.model), tensors(alone)
    for name in (n for n in after if n.endswith(("running_mean", "running_var"))):
        other = torch.tensor([u for u in range(8) if u not in units])
        assert torch.allclose(after[name][torch.tensor(units)], own[name], atol=1e-6)
        assert torch.equal(after[name][other], before[name][other])
        assert not torch.equal(after[name], before[name])


def test_a_part_of_all_units_is_the_model_itself(simulate):
    task = make_task(simulate(0, extract="heterofl", aggregate="overlap").server)
    assert task.make_part({name: torch.arange(n) for name, n in task.full_sizes.items()}) is task.model


def test_parts_train_by_one_backward_pass_as_by_one_each(simulate):
    """the statistics of the leading part are a view of the model's, which the other parts write to"""
    server = simulate(0, extract="heterofl", aggregate="overlap", model="cnn", model_args={"widths": [8, 8]}).server
    task, x = make_task(server), torch.randn(6, 1, 8, 8)
    parts = [task.make_part({g.name: units for g in server.widths.groups}) for units in torch.arange(8).split(4)]
    sum(part(x).square().sum() for part in parts).backward()
    together, statistics = [p.grad.clone() for p in task.model.parameters()], copy_state(task.model)
    load_state(task.model, server.state).zero_grad()
    for part in parts:
        part(x).square().sum().backward()
    assert all(torch.allclose(g, p.grad, atol=1e-4) for g, p in zip(together, task.model.parameters(), strict=True))
    assert all(torch.equal(t, statistics[name]) for name, t in tensors(task.model).items())
