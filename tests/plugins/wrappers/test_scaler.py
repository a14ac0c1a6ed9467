"""HeteroFL's masked cross entropy and scaler."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hetfl.plugins.methods.heterofl import mask_absent_classes, scale_activations


def test_masked_cross_entropy():
    """spec heterofl 6.5"""
    z = torch.tensor([[2.0, 1.0, -1.0]], requires_grad=True)
    loss = mask_absent_classes(torch.tensor([True, False, True]))(z, torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.169846, abs=1e-6)
    assert z.grad[0, 1] == 0


def test_scaler_acts_in_training_only():
    """spec heterofl 6.6: s = .25, x = 1: train 4, eval 1"""
    seen = []

    class Probe(nn.LayerNorm):
        def forward(self, x):
            seen.append(x.flatten()[0].item())
            return x

    model = nn.Sequential(Probe(1))
    with scale_activations(model, 0.25):
        model.train()(torch.ones(1, 1))
        model.eval()(torch.ones(1, 1))
    model.train()(torch.ones(1, 1))
    assert seen == [4, 1, 1]


def test_scaler_without_norms_scales_hidden_outputs():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).train()
    nn.init.ones_(model[0].weight), nn.init.ones_(model[1].weight)
    with scale_activations(model, 0.5):
        assert model(torch.ones(1, 1)).item() == 2
