"""Width groups: whose channels go together, what is frozen and why, which models are refused."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from torch import nn

from helpers.elastic import traced_net
from hetfl.errors import UsageError
from hetfl.models.sequences import Encoder
from hetfl.submodel.slicing import build_submodel
from hetfl.submodel.tracing.groups import trace


@pytest.mark.parametrize("whole", [False, True])
def test_what_is_cut_of_heads(whole):
    """spec heterofl 2.2: with E = 8 and H = 2, half the width keeps units 0, 1, 4, 5; whole heads keep the first."""
    layer = nn.MultiheadAttention(8, 2, batch_first=True)

    class Self(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.attention, self.head = nn.Linear(8, 8), layer, nn.Linear(8, 3)

        def forward(self, x):
            x = self.into(x)
            return self.head(self.attention(x, x, x)[0].mean(1))

    model = Self()
    widths = trace(model, torch.randn(2, 5, 8), heads="whole" if whole else "width")
    kept = widths.prefix(0.5)
    rows = widths.index(kept)["attention.in_proj_weight"][0]
    small = build_submodel(widths, model, kept)
    assert rows[:4].tolist() == ([0, 1, 2, 3] if whole else [0, 1, 4, 5])
    assert (small.attention.num_heads, small.attention.embed_dim) == ((1, 4) if whole else (2, 4))


def test_whole_heads_of_attention_by_hand():
    model = Encoder(4, 50, 12, 16, 1, 4)
    widths = trace(model, torch.randint(1, 50, (2, 12)), heads="whole")
    small = build_submodel(widths, model, widths.prefix(0.5))
    assert small.layers[0].attention.heads == 2
    assert small.layers[0].attention.q.weight.shape == (8, 8)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x):
        return self.a(x.flatten(1)) if x.sum() > 1e9 else self.b(x.flatten(1))


def test_a_path_that_was_not_taken_is_refused():
    with pytest.raises(UsageError, match=r"^the forward pass of 'Branches' branches on the values of tensors, and 'a.weight' lies"):
        trace(Branches(), torch.randn(2, 1, 8, 8))


class Greedy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 10)

    def forward(self, x, lengths, mask=None):
        return self.a(x.flatten(1))


def test_a_module_that_needs_other_inputs_is_refused():
    with pytest.raises(UsageError, match=r"forward needs 2 inputs \(x, lengths\) but gets only the examples: wrap it"):
        trace(Greedy(), torch.randn(2, 1, 8, 8))


class HardCoded(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6 * 64, 10)

    def forward(self, x):
        return self.head(self.b(torch.relu(self.a(x))).view(-1, 6 * 64))


def test_a_size_fixed_in_the_code_is_frozen_and_the_rest_is_cut():
    model = HardCoded()
    widths = trace(model, torch.randn(2, 1, 8, 8))
    assert [g.name for g in widths.groups] == ["a"]
    assert "b" in widths.frozen


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.cumsum(self.a(x.flatten(1)), 1))))


def test_an_unknown_operation_freezes_what_it_touches():
    widths = trace(Unknown(), torch.randn(2, 16))
    assert [g.name for g in widths.groups] == ["b"]
    assert any("cumsum" in why for why in widths.frozen.values())


def test_a_model_that_does_not_run_is_refused():
    with pytest.raises(UsageError, match="does not run on inputs of shape"):
        trace(nn.Linear(3, 2), torch.randn(2, 4))


@pytest.mark.parametrize("name", ["fedconv-cnn", "cnn", "resnet18", "preresnet18"])
def test_partition_equals_torch_prunings(name):
    """The output channels that Torch-Pruning removes together with the first channel of each layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruning = pytest.importorskip("torch_pruning")
        model, x, widths = traced_net(name)
        graph = pruning.DependencyGraph().build_dependency(model, example_inputs=x)
        names = {m: n for n, m in model.named_modules()}
        theirs = {}
        for layer, prune in [(m, pruning.prune_conv_out_channels) for m in model.modules() if isinstance(m, nn.Conv2d)]:
            group = graph.get_pruning_group(layer, prune, idxs=[0])
            outs = {
                names[dep.target.module]
                for dep, _ in group
                if dep.handler.__name__ == "prune_out_channels" and isinstance(dep.target.module, nn.Conv2d)
            }
            theirs[names[layer]] = frozenset(outs)
    ours = {}
    for n, axes in widths.axes.items():
        if 0 in axes and widths.shapes[n].__len__() == 4:
            ours.setdefault(axes[0].groups[int(axes[0].group[0])], set()).add(n.removesuffix(".weight"))
    assert {frozenset(v) for v in ours.values()} == set(theirs.values())


def test_models_that_run_in_other_threads_are_not_taken_for_the_traced_one():
    net, stop = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), threading.Event()
    other = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))

    def run():
        while not stop.is_set():
            other(torch.zeros(1, 3))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        found = [[(g.name, g.size) for g in trace(net, torch.zeros(2, 4)).groups] for _ in range(20)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert found == [[("0", 6)]] * 20
