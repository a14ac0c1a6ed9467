"""Modules that nobody wrote for us: traced, cut at random, sliced == masked, and trained by every kind of extraction."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as read
from torch import nn
from torch.nn import functional as F

from hetfl.config import resolve
from hetfl.errors import UsageError
from hetfl.models.convnets import CNN, FedConvHAR
from hetfl.models.deep_convnets import GoogLeNet, MobileNetV2
from hetfl.models.sequences import LSTM, CNN1d, Encoder
from hetfl.models.state import tensors
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import runner
from hetfl.runs.folder import RunFolder
from hetfl.submodel.slicing import build_submodel
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.tracing.verify import compare_cut, draw_units


class Heads(nn.Module):
    """Attention written by hand: fused projection, sizes as attributes and from shapes, class token, positions."""

    def __init__(self, classes=10, size=8, dim=24, heads=4):
        super().__init__()
        self.patch = nn.Conv2d(1, dim, 2, 2)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 1 + (size // 2) ** 2, dim))
        self.num_heads, self.head_dim, self.scale = heads, dim // heads, (dim // heads) ** -0.5
        self.norm, self.qkv, self.proj = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down, self.head = nn.Linear(dim, 40), nn.Linear(20, dim), nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        b, n, c = (x := torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places).shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = x + self.proj(((q @ k.transpose(-2, -1)) * self.scale).softmax(-1).matmul(v).transpose(1, 2).reshape(b, n, c))
        return self.head((x + self.down(F.glu(self.up(x))))[:, 0])


class Torchs(nn.Module):
    """torch's own attention, over the rows of the picture."""

    def __init__(self, classes=10, size=8):
        super().__init__()
        self.embed = nn.Linear(size, 24)
        self.layer = nn.TransformerEncoderLayer(24, 4, 48, 0.1, batch_first=True)
        self.cross = nn.MultiheadAttention(24, 3, batch_first=True)
        self.head = nn.Linear(24, classes)

    def forward(self, x):
        x = self.layer(self.embed(x[:, 0]))
        return self.head(x[:, 0] + self.cross(x[:, :1], x, x, need_weights=False)[0][:, 0])


class Recurrent(nn.Module):
    """Two bidirectional LSTM layers, a GRU and a cell in a Python loop."""

    def __init__(self, classes=10, size=8):
        super().__init__()
        self.lstm = nn.LSTM(size, 10, 2, bidirectional=True, batch_first=True, dropout=0.2)
        self.gru, self.cell, self.head = nn.GRU(20, 12, batch_first=True), nn.GRUCell(12, 14), nn.Linear(14 + 10, classes)

    def forward(self, x):
        out, (h, _) = self.lstm(x[:, 0])
        state = None
        for step in self.gru(out)[0].unbind(1):
            state = self.cell(step, state)
        return self.head(torch.cat([state, h[-1]], 1))


class Odd(nn.Module):
    """Einsum, 1-D and 3-D convolutions, patches, group and instance norms, a shared layer, a layer used in training alone."""

    def __init__(self, classes=10):
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.GroupNorm(4, 12)
        self.plain = nn.InstanceNorm2d(12)
        self.mix = nn.Parameter(torch.randn(12, 10))
        self.shared = nn.Linear(10, 10)
        self.line, self.cube = nn.Conv1d(10, 8, 3, padding=1), nn.Conv3d(8, 6, 1)
        self.patches = nn.Conv1d(6 * 4, 9, 1)
        self.head, self.extra = nn.Linear(9, classes), nn.Linear(12, classes)

    def forward(self, x):
        a = self.plain(self.norm(self.a(x)))
        y = torch.einsum("bchw,cd->bhwd", a, self.mix)
        y = torch.relu(self.shared(torch.relu(self.shared(y)))).permute(0, 3, 1, 2)
        y = self.line(y.flatten(2)).unflatten(2, x.shape[2:])
        y = F.unfold(self.cube(y[:, :, None])[:, :, 0], 2, stride=2)
        y = self.head(self.patches(y).amax(2))
        return y + self.extra(a.amax((2, 3))) if self.training else y


class Tied(nn.Module):
    """The embedding's weights read the tokens and score them."""

    def __init__(self, classes=10):
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(17, 16), nn.Linear(16, 16), nn.Linear(17, classes)

    def forward(self, x):
        y = self.mid(self.embed(x[:, 0, 0].abs().round().long() % 17).mean(1))
        return self.head(F.linear(torch.relu(y), self.embed.weight))


class Mixer(nn.Module):
    """A token-mixing layer over positions, pixel shuffle, a gate of one channel."""

    def __init__(self, classes=10):
        super().__init__()
        self.a, self.up, self.b = nn.Conv2d(1, 32, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(8, 16, 4, 4)
        self.tokens, self.gate, self.head = nn.Linear(16, 16), nn.Linear(16, 1), nn.Linear(16, classes)

    def forward(self, x):
        y = self.b(F.elu(self.up(self.a(x)))).flatten(2)
        y = (y + torch.tanh(self.tokens(y))).transpose(1, 2)
        return self.head((self.gate(y).softmax(1) * y).sum(1))


class Start(nn.Module):
    """A recurrent net whose first state is made from an attribute, and whose width is read from it again."""

    def __init__(self, classes=10, hidden=12):
        super().__init__()
        self.hidden = hidden
        self.gru, self.norm, self.head = nn.GRU(8, hidden, batch_first=True), nn.LayerNorm(hidden), nn.Linear(hidden, classes)

    def forward(self, x):
        out, _ = self.gru(x[:, 0], torch.zeros(1, len(x), self.hidden))
        return self.head(self.norm(out.reshape(-1, 8, self.hidden)[:, -1]))


MODULES = {"heads": Heads, "torchs": Torchs, "recurrent": Recurrent, "odd": Odd, "tied": Tied, "mixer": Mixer, "start": Start}

ZOO = {
    "fedconv-har": (lambda: FedConvHAR(5, 1, 30), (1, 30, 30)),
    "googlenet": (lambda: GoogLeNet(10, 3, shrink=8), (3, 16, 16)),
    "mobilenetv2": (lambda: MobileNetV2(10, 3, 0.5, last=64), (3, 16, 16)),
    "lstm": (lambda: LSTM(5, 1, (20, 6)), (1, 20, 6)),
    "cnn1d": (lambda: CNN1d(5, 1, (20, 6), (8, 12, 16)), (1, 20, 6)),
}


def traced(name):
    torch.manual_seed(0)
    if name in MODULES:
        return MODULES[name](), torch.randn(2, 1, 8, 8)
    make, shape = ZOO[name]
    return make(), torch.randn(2, *shape)


@pytest.mark.parametrize("name", [*MODULES, *ZOO])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=4, deadline=None)
def test_sliced_is_masked_and_trains(name, seed):
    model, x = traced(name)
    before = {n: t.clone() for n, t in tensors(model).items()}
    widths = trace(model, x)
    assert all(torch.equal(t, before[n]) for n, t in tensors(model).items())
    assert widths.elastic() > 0.7
    draw = torch.Generator().manual_seed(seed)
    kept = {g.name: draw_units(g.size, draw) for g in widths.groups}
    small, error = compare_cut(widths, model, [x], kept, draw)
    assert error <= 1e-5
    small.train()(x).sum().backward()


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


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: GoogLeNet(10, 3), 6166250),
        (lambda: MobileNetV2(10, 3), 2236682),
        (lambda: FedConvHAR(5, 1, 30), 15141),
        (lambda: Encoder(4, 50265, 514, 768, 12, 12, 3072), 124647940),
        (lambda: LSTM(5, 1, (100, 6)), 18757),
    ],
)
def test_parameter_counts(make, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == count


def test_frozen_affine_of_the_harbox_net():
    norms = [m for m in FedConvHAR(5, 1, 30).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 2
    assert not any(p.requires_grad for m in norms for p in m.parameters())


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 10), nn.Linear(64, 10)

    def forward(self, x):
        return self.a(x.flatten(1)) if x.sum() > 1e9 else self.b(x.flatten(1))


class Greedy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(64, 10)

    def forward(self, x, lengths, mask=None):
        return self.a(x.flatten(1))


def test_a_path_that_was_not_taken_is_refused():
    with pytest.raises(UsageError, match=r"^the forward pass of 'Branches' branches on the values of tensors, and 'a.weight' lies"):
        trace(Branches(), torch.randn(2, 1, 8, 8))


def test_a_module_that_needs_other_inputs_is_refused():
    with pytest.raises(UsageError, match=r"forward needs 2 inputs \(x, lengths\) but gets only the examples: wrap it"):
        trace(Greedy(), torch.randn(2, 1, 8, 8))


@pytest.fixture
def held_out(monkeypatch):
    module = types.ModuleType("held_out")
    for name, made in MODULES.items():
        setattr(module, name, made)
    monkeypatch.setitem(sys.modules, "held_out", module)


@pytest.mark.parametrize("extract", ["heterofl", "fedrolex", "fedconv"])
@pytest.mark.parametrize("name", ["heads", "torchs", "recurrent", "odd", "mixer", "start"])
def test_any_module_trains_with_any_extraction(held_out, tmp_path, extract, name):
    values = {"limit": 200, "clients": 3, "rounds": 2, "epochs": 1, "pretrain_steps": 3, "partition": "iid", "lr": 0.01}
    options = {"fedconv": {"steps": 2, "first_steps": 2}} if extract == "fedconv" else {}
    found = []
    for workers in (1, 2):
        folder = RunFolder(tmp_path / str(workers)).open()
        chosen = {"extract": extract, "aggregate": "overlap", "model": f"held_out:{name}", "levels": "1:1,0.5:1,0.25:1"}
        runner.run(resolve({**values, **chosen, "set": options, "workers": workers}), folder, NoCallback())
        found.append(read((folder.path / "weights.safetensors").read_bytes()))
    assert all(bool(torch.isfinite(t).all()) for t in found[0].values())
    assert all(torch.equal(t, found[1][n]) for n, t in found[0].items())


def test_batch_norm_nets_are_equal_without_leaving_anything_out():
    torch.manual_seed(0)
    model, x = CNN(10, 1, (16, 32, 64)).eval(), torch.randn(2, 1, 28, 28)
    widths = trace(model, x)
    kept = {g.name: draw_units(g.size, torch.Generator().manual_seed(1)) for g in widths.groups}
    assert compare_cut(widths, model, [x], kept, torch.Generator().manual_seed(2))[1] <= 1e-5
