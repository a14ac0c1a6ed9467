"""Task kinds: losses, scores and distances, each held against plain torch or numbers by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from hetfl.data.dataset import Examples
from hetfl.data.kinds import CLASSIFY
from hetfl.training.evaluation import evaluate


def test_classes_are_scored_by_accuracy_and_cross_entropy():
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(3, 4), torch.randn(10, 3), torch.randint(4, (10,))
    found, out = evaluate(model, Examples(x, y, torch.arange(10)), 4), model(x)
    assert found.accuracy == pytest.approx((out.argmax(1) == y).double().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(out, y).item())
    assert found.examples == 10


def test_the_divergence_of_classes_is_kl_at_a_temperature():
    torch.manual_seed(0)
    own, teacher = torch.randn(5, 4), torch.randn(5, 4)
    p, q = (teacher / 3).softmax(1), (own / 3).softmax(1)
    assert torch.isclose(CLASSIFY.divergence(own, teacher, 3.0), (p * (p / q).log()).sum(1).mean())
