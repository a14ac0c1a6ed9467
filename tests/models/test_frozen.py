"""What is not trained belongs to the architecture: once in memory, and no part of the state."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hetfl.models.adapters import AdapterSpec, add_adapters
from hetfl.models.convnets import CNN
from hetfl.models.frozen import base_hash, freeze, frozen
from hetfl.models.state import tensors
from hetfl.profiling.cost import count_parameters
from hetfl.submodel.builder import SubmodelBuilder
from hetfl.submodel.tracing.groups import trace


def adapted():
    torch.manual_seed(0)
    x = torch.randn(2, 1, 8, 8)
    return add_adapters(CNN(4, 1, widths=(4, 6)), AdapterSpec(2, 4.0, "conv"), x, (4,)), x


def test_a_frozen_parameter_leaves_the_state_and_the_model_computes_the_same():
    model, x = adapted()
    whole, before, count = tensors(model), model.eval()(x), sum(p.numel() for p in model.parameters())
    freeze(model)
    assert torch.equal(model(x), before)
    assert count_parameters(model) == count
    assert set(tensors(model)) | set(frozen(model)) == set(whole)
    assert not set(tensors(model)) & set(frozen(model))
    assert all("base_layer" in name or name.startswith(("1.", "5.")) for name in frozen(model))
    assert base_hash(copy.deepcopy(model)) == base_hash(model)
    assert base_hash(nn.Linear(2, 2)) is None


def test_tied_tensors_stay_tied_and_recurrent_layers_compute_with_them():
    torch.manual_seed(0)
    net = nn.ModuleDict({"a": nn.LSTM(3, 4), "b": nn.Embedding(5, 4), "c": nn.Linear(4, 5, bias=False)})
    net["c"].weight = net["b"].weight
    x = torch.randn(2, 1, 3)
    before = net["a"](x)[0]
    freeze(net.requires_grad_(False))
    assert net["c"].weight is net["b"].weight
    assert "c.weight" not in frozen(net)
    assert torch.equal(net["a"](x)[0], before)
    net["a"].weight_ih_l0.zero_()
    assert not torch.equal(net["a"](x)[0], before), "the layer computes with a tensor that is not its own"


class Casts(TorchDispatchMode):
    """Notes how many values each cast to bfloat16 gives."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and out.dtype == torch.bfloat16:
            self.counts.append(out.numel())
        return out


def test_the_largest_tensors_are_cast_last():
    """When the others are free already: casting never takes much more than the model in float32."""
    net = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 16), nn.Linear(16, 8)).requires_grad_(False)
    with Casts() as casts:
        freeze(net, low=True)
    assert casts.counts[-1] == 800
    assert sum(casts.counts) == 800 + 2 * 128 + 16 + 8


def test_all_modules_have_one_base():
    model, x = adapted()
    widths = trace(model, x)
    builder = SubmodelBuilder(freeze(model), widths)
    half = {name: len(units) for name, units in widths.prefix(0.5).items()}

    def bases(sizes):
        with ThreadPoolExecutor(1) as other:
            found = [builder.module(sizes), other.submit(builder.module, sizes).result(), builder.build(sizes)]
        return [frozen(module) for module in found]

    for sizes in (None, half):
        first, *others = bases(sizes)
        assert first
        assert all(first[name] is base[name] for base in others for name in first)
    whole = bases(None)[0]
    assert all(t is builder.base[name] for name, t in whole.items())
    small = builder.module(half)
    assert small.eval()(x).shape == (2, 4)
    assert frozen(small)["4.base_layer.weight"].shape == (3, 2, 3, 3)
