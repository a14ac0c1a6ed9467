"""Modules that nobody wrote for us, to be traced and cut."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from hetfl.models.convnets import FedConvHAR
from hetfl.models.deep_convnets import GoogLeNet, MobileNetV2
from hetfl.models.sequences import LSTM, CNN1d


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


class Pooled(nn.Module):
    """Logits that no layer makes: the means over positions of as many channels as there are classes."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv = nn.Conv2d(1, classes, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


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


class Start(nn.Module):
    """A recurrent net whose first state is made from an attribute, and whose width is read from it again."""

    def __init__(self, classes=10, hidden=12):
        super().__init__()
        self.hidden = hidden
        self.gru, self.norm, self.head = nn.GRU(8, hidden, batch_first=True), nn.LayerNorm(hidden), nn.Linear(hidden, classes)

    def forward(self, x):
        out, _ = self.gru(x[:, 0], torch.zeros(1, len(x), self.hidden))
        return self.head(self.norm(out.reshape(-1, 8, self.hidden)[:, -1]))


class Tied(nn.Module):
    """The embedding's weights read the tokens and score them."""

    def __init__(self, classes=10):
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(17, 16), nn.Linear(16, 16), nn.Linear(17, classes)

    def forward(self, x):
        y = self.mid(self.embed(x[:, 0, 0].abs().round().long() % 17).mean(1))
        return self.head(F.linear(torch.relu(y), self.embed.weight))


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


class SplitAttention(nn.Module):
    """Attention of `heads` heads with a projection each for queries, keys and values."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, q, k, v):
        split = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f, x in ((self.q, q), (self.k, k), (self.v, v)))
        return self.out(F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))
