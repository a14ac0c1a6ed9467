"""Models with exits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hetfl.errors import NotApplicable
from hetfl.models.convnets import FedConvCNN
from hetfl.models.early_exit import add_exits, all_exits
from hetfl.models.state import tensors
from hetfl.submodel.depth import Depth
from hetfl.submodel.plan import Selection, grow
from hetfl.submodel.slicing import build_submodel
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.widths import prefix


def test_exits_of_a_model_end_where_they_should():
    torch.manual_seed(0)
    x = torch.randn(3, 1, 8, 8)
    model = add_exits(FedConvCNN(10, 1, 8), x, 10, 4, 1).eval()
    assert model.depth == len(model.points) + 1 >= 3
    with all_exits(model):
        widths, logits = trace(model, x), model(x).chunk(model.depth, 1)
    assert torch.equal(logits[-1], model(x))
    for depth in range(1, model.depth + 1):
        small = model.at_depth(depth).eval()
        assert torch.equal(small(x), logits[depth - 1])
        assert set(small.state_dict()) == model.names(depth) <= set(model.state_dict())
        plan = Selection(widths, widths.select(prefix(0.5)), names=model.names(depth), depth=Depth(depth))
        narrow = build_submodel(widths, small, plan.kept)
        taken = plan.take(tensors(model))
        assert {n: t.shape for n, t in tensors(narrow).items()} == {n: t.shape for n, t in taken.items()}
        full, cover = grow(plan.put(taken), {n: t + 1 for n, t in tensors(model).items()})
        assert all(torch.equal(full[n], torch.where(cover[n] > 0, t, t + 1)) for n, t in tensors(model).items())
    assert len(model.names(1)) < len(model.names(2)) < len(model.names(model.depth))


def test_a_model_may_bring_its_own_exits(simulate, monkeypatch):
    from hetfl.models import zoo as models
    from hetfl.models.early_exit import add_exits

    def net(classes, channels, size):
        return add_exits(models.FedConvCNN(classes, channels, size), torch.randn(2, channels, size, size), classes, 2, 0)

    monkeypatch.setitem(models.ZOO, "exitnet", net)
    made = simulate(extract="scalefl", aggregate="overlap", model="exitnet", model_args={})
    assert made.server.builder.model.depth == 2


class Bare(nn.Module):
    """A model of parameters alone, without a module between them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))

    def forward(self, x):
        return x @ self.weight.T


def test_a_model_without_features_between_its_layers_gets_no_exits():
    with pytest.raises(NotApplicable, match="no classifier can be put behind one"):
        add_exits(Bare(), torch.ones(2, 4), 3, 2, 0)
