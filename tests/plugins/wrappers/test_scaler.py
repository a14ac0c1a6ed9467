"""HeteroFL's scaler."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from helpers.tasks import make_task
from hetfl.plugins.wrappers.scaler import Scaler, scale_activations


def test_scaler_acts_in_training_only():
    """spec heterofl 6.6: s = .25, x = 1: train 4, eval 1; after every weighted layer but the last"""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    nn.init.ones_(model[0].weight), nn.init.ones_(model[1].weight)
    with scale_activations(model, 0.25):
        assert model.train()(torch.ones(1, 1)).item() == 4
        assert model.eval()(torch.ones(1, 1)).item() == 1
    assert model.train()(torch.ones(1, 1)).item() == 1


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.LayerNorm(6), nn.GroupNorm(2, 6), nn.RMSNorm(6)])
def test_a_norm_trains_on_x_over_s_and_tracks_x(norm):
    """spec heterofl 2.3: y = sBN(x / s) in training; evaluation uses x, so the running statistics must be those of x"""
    s, x = 0.25, (1e-3 * torch.randn(32, 6, generator=torch.Generator().manual_seed(0))).requires_grad_()
    plain, weights = copy.deepcopy(norm).train(), torch.randn(32, 6)
    with scale_activations(nn.Sequential(norm).train(), s):
        ours = norm(x)
        (gradient,) = torch.autograd.grad((ours * weights).sum(), x)
        at_rest = norm.eval()(x)
    scaled = plain(x / s)
    (expected,) = torch.autograd.grad((scaled * weights).sum(), x)
    assert torch.allclose(ours, scaled, rtol=1e-4, atol=1e-5)
    assert torch.allclose(gradient, expected, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(ours, copy.deepcopy(plain)(x), rtol=1e-2)
    if isinstance(norm, nn.BatchNorm1d):
        assert torch.allclose(norm.running_var, 0.9 + 0.1 * x.var(0), atol=1e-6)
        assert torch.allclose(norm.running_mean, 0.1 * x.mean(0), atol=1e-6)
    untouched = copy.deepcopy(norm)
    untouched.eps = plain.eps
    assert torch.equal(at_rest, untouched.eval()(x))
    with scale_activations(nn.Sequential(norm).train(), s):
        norm(x)
    assert norm.eps == plain.eps


def test_scaler_leaves_no_trace_in_the_statistics(simulate):
    """Issue 14.1: the means that clients track are of the size that the global model sees, whatever their width."""
    more = {"extract": "heterofl", "aggregate": "overlap", "model": "cnn", "model_args": {"widths": [8, 8]}, "levels": "1/4:1"}
    bare, scaled = (simulate(1, **more, wrap=wrap).server.state for wrap in ((), ("scaler",)))
    covered = slice(0, 2)
    ratio = scaled["1.running_var"][covered] / bare["1.running_var"][covered]
    assert ratio.max() < 2


@pytest.mark.parametrize("model", [{}, {"model": "cnn", "model_args": {"widths": [8, 8]}}], ids=["without norms", "with norms"])
def test_parts_that_train_apart_are_scaled_by_their_own_share(simulate, model):
    server = simulate(0, extract="heterofl", aggregate="overlap", **model).server
    task, x = make_task(server), 1e-2 * torch.randn(6, 1, 8, 8)
    plan = server.select({g.name: torch.arange(g.size // 4) for g in server.widths.groups})
    part, alone = task.make_part(plan.kept), server.builder.load(plan.take(server.state), plan.sizes).train()
    bare, fit = part(x), Scaler().fit(task)
    next(fit)
    scaled = part(x)
    with pytest.raises(StopIteration):
        fit.send(None)
    with scale_activations(alone, sum(plan.sizes.values()) / sum(task.full_sizes.values())):
        assert torch.allclose(scaled, alone(x), atol=1e-5)
    assert not torch.allclose(scaled, bare, rtol=1e-2, atol=1e-3)
    assert torch.allclose(part(x), bare, atol=1e-5)
