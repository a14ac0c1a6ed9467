"""Low-rank adapters in any module."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hetfl.errors import NotApplicable, UsageError
from hetfl.models.adapters import AdapterSpec, Lora, add_adapters, find_heads, list_adapters, list_targets, parse_adapter
from hetfl.models.convnets import CNN
from hetfl.models.deep_convnets import MobileNetV2
from hetfl.models.sequences import Encoder
from hetfl.models.state import tensors
from hetfl.rng import stream
from hetfl.submodel.plan import Selection
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.tracing.verify import compare_cut


def encoder():
    torch.manual_seed(0)
    return Encoder(4, 50, 6, width=8, layers=1, heads=2, dropout=0.0), torch.randint(1, 50, (3, 6))


def test_what_an_adapter_option_says():
    assert parse_adapter("lora:rank=4,alpha=12,target=layers\\.[0,1]\\.up") == AdapterSpec(4, 12.0, "layers\\.[0,1]\\.up")
    assert parse_adapter("lora") == AdapterSpec()
    assert AdapterSpec(4, 12.0).scale == 3
    assert parse_adapter("own") is None


@pytest.mark.parametrize(
    ("text", "word"),
    [("lara:rank=4", "did you mean 'lora'"), ("lora:rnk=4", "did you mean 'rank'"), ("lora:rank=four", "four"),
     ("lora:rank=0", "from 1 to 16,384"), ("lora:rank=99999999999", "from 1 to"), ("lora:target=(", "unterminated"),
     ("lora:target=", "'target' is given no value"), ("lora:rank=4,rank=5", "'rank' is given twice"),
     ("lora:alpha=", "'alpha' is given no value"), ("lora:heads=frosen", "did you mean 'frozen'")],
)  # fmt: skip
def test_what_is_no_adapter_is_said(text, word):
    with pytest.raises(UsageError, match=word.replace("(", "\\(")):
        parse_adapter(text)


def test_attention_alone_is_adapted_and_the_head_is_trained_whole():
    model, x = encoder()
    before = model.eval()(x)
    add_adapters(model, AdapterSpec(2, 6.0, "attention"), x, (4,))
    assert {n for n, m in model.named_modules() if isinstance(m, Lora)} == {
        f"layers.0.attention.{p}" for p in ("q", "k", "v", "out")
    }
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    halves = {f"layers.0.attention.{p}.lora_{h}.weight" for p in ("q", "k", "v", "out") for h in "AB"}
    assert trained == halves | {"head.weight", "head.bias"}
    assert torch.equal(model(x), before), "an adapter changed the model before it was trained"


def test_who_reads_a_weight_passes_no_adapter_by():
    layer = Lora(nn.Linear(2, 2), 1, 1.0)
    with pytest.raises(AttributeError, match="a module reads the weight of a layer with an adapter"):
        nn.functional.linear(torch.ones(1, 2), layer.weight)
    assert not hasattr(layer, "bias")
    assert copy.deepcopy(layer).lora_A.weight.shape == (1, 2)


def test_heads_may_stay_as_they_are():
    model, x = encoder()
    add_adapters(model, parse_adapter("lora:rank=2,target=attention,heads=frozen"), x, (4,))
    assert all(".lora_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_layers_that_can_have_an_adapter_by_kind():
    net = MobileNetV2(10, 3)
    kinds = {type(net.get_submodule(name)) for name in list_targets(net, "conv")}
    assert kinds == {nn.Conv2d}
    assert all(net.get_submodule(n).groups == 1 for n in list_targets(net, "conv"))
    assert find_heads(net, torch.zeros(2, 3, 32, 32), (10,)) == list_targets(net, "linear")
    assert list_targets(encoder()[0], "up$") == ["layers.0.up"]


def test_layers_whose_weights_others_read_get_none():
    net = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(24, 4))
    assert list_targets(net, "linear") == ["2"]
    with pytest.raises(NotApplicable, match="the head among them: 2"):
        add_adapters(net, AdapterSpec(), torch.zeros(2, 3, 8), (4,))


@pytest.mark.parametrize("kind", ["attention", "conv"])
def test_ranks_are_proven_width_groups_and_the_scale_stays(kind):
    model, x = encoder() if kind == "attention" else (CNN(4, 1, widths=(4, 6)), torch.randn(3, 1, 8, 8))
    add_adapters(model, AdapterSpec(4, 8.0, kind), x, (4,))
    widths, adapters = trace(model, x), list_adapters(list(tensors(model)))
    ranks = {g: cut for g, cut in widths.members().items() if any("lora_A" in c and c.endswith("[0]") for c in cut)}
    assert sorted(ranks.values()) == sorted([f"{a.a}[0]", f"{a.b}[1]"] for a in adapters)
    kept = {g.name: torch.arange(2 if g.name in ranks else g.size) for g in widths.groups}
    assert compare_cut(widths, model, [x], kept, stream(0, "test"))[1] < 1e-5
    assert Selection(widths, kept).take(tensors(model))[adapters[0].a].shape[0] == 2
