"""The head of a model, and the features before it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hetfl.data.inputs import Inputs
from hetfl.errors import NotApplicable
from hetfl.models.early_exit import add_exits, all_exits
from hetfl.models.factory import build_model
from hetfl.models.features import find_head, find_heads, watching_features

PICTURES, TEXT = Inputs((3, 32, 32), 7, None), Inputs((16,), 7, 50)


@pytest.mark.parametrize("name", ["mlp", "cnn", "fedconv-cnn", "preresnet18", "googlenet", "mobilenetv2", "encoder"])
def test_the_logits_of_every_net_are_its_head_on_the_features(name):
    inputs = TEXT if name == "encoder" else PICTURES
    model, x = build_model(name, {}, inputs, 0), inputs.batch()
    training = [m.training for m in model.modules()]
    head = find_head(model, x, 7)
    assert [m.training for m in model.modules()] == training
    with watching_features([model], head) as seen:
        logits = model.eval()(x)
    assert torch.equal(model.get_submodule(head)(seen.last), logits)
    assert not model.get_submodule(head)._forward_pre_hooks


def test_of_several_exits_the_deepest_is_the_head_even_where_all_answer():
    model, x = add_exits(build_model("cnn", {}, PICTURES, 0), PICTURES.batch(), 7, 3, 0), PICTURES.batch()
    head = find_head(model, x, 7)
    with all_exits(model):
        assert find_head(model, x, 7) == head
        assert model.every
        assert model(x).shape == (2, 21)
    assert head.startswith("net.")
    assert find_heads(model.at_depth(1), x, (7,))[-1].startswith("heads.0")


def test_gradients_pass_and_only_models_with_the_head_count():
    model, other = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), nn.Linear(4, 2)
    with watching_features([other, model], "1") as seen:
        model(torch.ones(5, 4))
        other(torch.zeros(6, 4))
    seen.last.sum().backward()
    assert model[0].weight.grad is not None
    assert len(seen.last) == 5


def test_a_model_whose_logits_no_layer_makes_has_no_head():
    with pytest.raises(NotApplicable, match="no layer of this Sequential"):
        find_head(nn.Sequential(nn.Conv2d(3, 7, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), PICTURES.batch(), 7)
