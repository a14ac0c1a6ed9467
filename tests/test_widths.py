"""Width groups: the counts of the papers, and a cut model computes what the masked full model does."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from hetfl.errors import UsageError
from hetfl.models.convnets import CNN, MLP, FedAvgCNN, FedConvCNN
from hetfl.models.deep_convnets import PreResNet, ResNet
from hetfl.models.state import load_state, tensors
from hetfl.submodel.blocks import put, take
from hetfl.submodel.slicing import build_submodel
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.widths import make_axis, unit_count


class Strange(nn.Module):
    """Residual, concatenation, depthwise and grouped convolution, a squeeze-excite gate."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 12, 3, padding=1)
        self.b = nn.Conv2d(12, 20, 1)
        self.dw = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.norm = nn.BatchNorm2d(32)
        self.gate = nn.Linear(32, 32)
        self.c = nn.Conv2d(32, 12, 1)
        self.grouped = nn.Conv2d(12, 24, 3, padding=1, groups=4)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        a = torch.relu(self.a(x))
        y = self.norm(self.dw(torch.cat([a, self.b(a)], 1)))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3))))[:, :, None, None]
        return self.head(nn.functional.adaptive_avg_pool2d(self.grouped(a + self.c(y)), 1).flatten(1))


class Shuffled(nn.Module):
    """Chunk, channel shuffle, transposed and depthwise transposed convolution, a raw scale, PReLU."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(16)
        self.scale = nn.Parameter(torch.ones(16, 1, 1))
        self.up, self.act = nn.ConvTranspose2d(16, 10, 2, 2), nn.PReLU(10)
        self.dw = nn.ConvTranspose2d(10, 10, 2, 2, groups=10)
        self.head = nn.Linear(10, 10)

    def forward(self, x):
        left, right = (self.norm(self.a(x)) * self.scale).chunk(2, 1)
        x = torch.cat([torch.relu(self.b(left)), right], 1)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.head(self.dw(self.act(self.up(x))).amax((2, 3)))


class HardCoded(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6 * 64, 10)

    def forward(self, x):
        return self.head(self.b(torch.relu(self.a(x))).view(-1, 6 * 64))


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 10)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.cumsum(self.a(x.flatten(1)), 1))))


ZOO = {
    "mlp": (lambda: MLP(10, 1, 8), (1, 8, 8)),
    "fedconv-cnn": (lambda: FedConvCNN(10, 1, 28), (1, 28, 28)),
    "fedavg-cnn": (lambda: FedAvgCNN(10, 1, 28, (8, 16), 64), (1, 28, 28)),
    "cnn": (lambda: CNN(10, 1, (16, 32, 64)), (1, 28, 28)),
    "preresnet18": (lambda: PreResNet(10, 3, (16, 32, 64, 128)), (3, 32, 32)),
    "resnet18": (lambda: ResNet(10, 3, (16, 32, 64, 128)), (3, 32, 32)),
    "strange": (Strange, (3, 16, 16)),
    "shuffled": (Shuffled, (3, 8, 8)),
}


def traced(name):
    make, shape = ZOO[name]
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(2, *shape)
    for tensor_name, tensor in tensors(model).items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5 if tensor_name.endswith("var") else torch.randn_like(tensor) * 0.1)
    return model, x, trace(model, x)


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cut_is_masked(name, seed):
    model, x, widths = traced(name)
    draw = torch.Generator().manual_seed(seed)
    kept = {}
    for group in widths.groups:
        size = int(torch.randint(1, group.size + 1, (1,), generator=draw))
        kept[group.name] = torch.randperm(group.size, generator=draw)[:size]
    index = widths.index(kept)
    state = tensors(model)
    small = {n: take(t, index.get(n, {})) for n, t in state.items()}
    masked = {n: put(small[n], index.get(n, {}), torch.zeros_like(t)) for n, t in state.items()}
    with torch.no_grad():
        ours = load_state(build_submodel(widths, model, kept), small).eval()(x)
        theirs = torch.func.functional_call(model, masked, (x,))
    assert widths.groups
    assert (ours - theirs).abs().max() <= 1e-5 * (1 + theirs.abs().max())


@pytest.mark.parametrize(
    ("make", "shape", "counts"),
    [
        (lambda: CNN(10, 1), (1, 28, 28), [1556874, 391370, 98922, 25274, 6594]),
        (lambda: PreResNet(10, 3), (3, 32, 32), [11172170, 2796714, 701018, 176178, 44510]),
        (lambda: PreResNet(10, 3, blocks=(1, 1, 1, 2)), (3, 32, 32), [9622090, 2408746, 603802, 151762, 38350]),
    ],
)
def test_parameters_of_levels_a_to_e(make, shape, counts):
    """spec heterofl 6.1"""
    model = make()
    widths = trace(model, torch.randn(2, *shape), verify=False)
    assert [parameters(build_submodel(widths, model, widths.prefix(2.0**-i))) for i in range(5)] == counts


def test_parameters_of_fedconvs_net():
    """spec fedconv 6.5"""
    model = FedConvCNN(10, 1, 28)
    widths = trace(model, torch.randn(2, 1, 28, 28))
    counts = {1: 20490, 0.75: 14506, 0.5625: 10396, 0.5: 9098, 0.25: 4266}
    assert {r: parameters(build_submodel(widths, model, widths.prefix(r))) for r in counts} == counts
    assert parameters(FedAvgCNN(10, 1, 28)) == 1663370


def test_slice_shapes():
    """spec heterofl 6.2: level c of the first convolutions and of the head"""
    model = PreResNet(10, 3)
    widths = trace(model, torch.randn(2, 3, 32, 32), verify=False)
    small = build_submodel(widths, model, widths.prefix(0.25))
    assert small.get_submodule("0").weight.shape == (16, 3, 3, 3)
    assert small.get_submodule("1").conv1.weight.shape == (16, 16, 3, 3)
    assert small.get_submodule("13").weight.shape == (10, 128)
    assert [unit_count(64, 2.0**-i) for i in range(5)] == [64, 32, 16, 8, 4]


def test_positions_of_kept_units_are_in_the_order_of_the_smaller_tensor():
    """The example of Axis.index: queries and keys of 4 units, of which 3 and 1 are kept; and a fixed position among them."""
    axis = make_axis(("heads",), [(0, unit) for unit in (0, 1, 2, 3, 0, 1, 2, 3)])
    assert axis.index({"heads": torch.tensor([3, 1])}).tolist() == [3, 1, 7, 5]
    mixed = make_axis(("a", "b"), [(0, 0), (-1, -1), (1, 0), (1, 1), (0, 1)])
    assert mixed.index({"a": torch.tensor([1]), "b": torch.tensor([0, 1])}).tolist() == [4, 1, 2, 3]


def test_a_size_fixed_in_the_code_is_frozen_and_the_rest_is_cut():
    model = HardCoded()
    widths = trace(model, torch.randn(2, 1, 8, 8))
    assert [g.name for g in widths.groups] == ["a"]
    assert "b" in widths.frozen


def test_an_unknown_operation_freezes_what_it_touches():
    widths = trace(Unknown(), torch.randn(2, 16))
    assert [g.name for g in widths.groups] == ["b"]
    assert any("cumsum" in why for why in widths.frozen.values())


def test_a_model_that_does_not_run_is_refused():
    with pytest.raises(UsageError, match="does not run on inputs of shape"):
        trace(nn.Linear(3, 2), torch.randn(2, 4))


def test_submodels_keep_their_attributes():
    model, _, widths = traced("strange")
    small = build_submodel(widths, model, widths.prefix(0.5))
    assert small.dw.groups == small.dw.in_channels == small.dw.out_channels == small.dw.weight.shape[0]
    assert small.grouped.groups == 4
    assert small.gate.in_features == small.norm.num_features == small.dw.weight.shape[0]


@pytest.mark.parametrize("name", ["fedconv-cnn", "cnn", "resnet18", "preresnet18"])
def test_partition_equals_torch_prunings(name):
    """The output channels that Torch-Pruning removes together with the first channel of each layer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruning = pytest.importorskip("torch_pruning")
        model, x, widths = traced(name)
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
