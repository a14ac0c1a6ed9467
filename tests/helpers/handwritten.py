"""Blocks as people write them by hand: each takes and gives (batch, 8 tokens, 24 channels), or (batch, 24, 8, 8) pictures."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS = 24, 4


class Attention(nn.Module):
    """Projections of their own, heads by view; `scores` says how q k^T is scaled."""

    def __init__(self, kv_heads=HEADS):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = HEADS, kv_heads, WIDTH // HEADS
        self.q, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * self.head_dim) for _ in range(2))

    def split(self, x, heads):
        return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    def scores(self, q, k):
        return q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5

    def attend(self, q, k, v):
        return self.scores(q, k).softmax(-1) @ v

    def forward(self, x):
        y = self.attend(
            self.split(self.q(x), self.heads), self.split(self.k(x), self.kv_heads), self.split(self.v(x), self.kv_heads)
        )
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], -1))


class SqrtOfSize(Attention):
    def scores(self, q, k):
        return torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1))


class SqrtOfTensor(Attention):
    def scores(self, q, k):
        return torch.matmul(q, k.mT) / torch.sqrt(torch.tensor(q.size(-1)))


class StoredScale(Attention):
    def __init__(self):
        super().__init__()
        self.scale = self.head_dim**-0.5

    def scores(self, q, k):
        return (q * self.scale) @ k.transpose(-2, -1)


class Einsums(Attention):
    def scores(self, q, k):
        return torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5


class GivenScale(Attention):
    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5)


class Cosine(Attention):
    """swinv2's: queries and keys of length 1, a learned temperature for each head."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.full((HEADS, 1, 1), 2.0))

    def scores(self, q, k):
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature.clamp(max=4.6).exp()


class Bert(Attention):
    """BERT's before transformers took torch's attention: sizes as attributes."""

    def __init__(self):
        super().__init__()
        self.all_head_size = self.heads * self.head_dim

    def split(self, x, heads):
        return x.view(*x.size()[:-1], heads, self.head_dim).permute(0, 2, 1, 3)

    def scores(self, q, k):
        return torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.head_dim)

    def forward(self, x):
        y = self.attend(*(self.split(layer(x), self.heads) for layer in (self.q, self.k, self.v))).permute(0, 2, 1, 3).contiguous()
        return self.out(y.view(*y.size()[:-2], self.all_head_size))


class Grouped(Attention):
    """llama's grouped queries: each key is repeated for its queries."""

    def __init__(self):
        super().__init__(kv_heads=2)

    def attend(self, q, k, v):
        k, v = (self.repeat(x, self.heads // self.kv_heads) for x in (k, v))
        return self.scores(q, k).softmax(-1) @ v

    def repeat(self, x, times):
        b, heads, n, dim = x.shape
        return x[:, :, None].expand(b, heads, times, n, dim).reshape(b, heads * times, n, dim)


class MultiQuery(Attention):
    """One key and value for all queries, by broadcasting."""

    def __init__(self):
        super().__init__(kv_heads=1)


class Fused(nn.Module):
    """One projection of queries, keys and values; `cut` says how it is taken apart, into (batch, heads, tokens, width)."""

    rows = 3 * WIDTH

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, self.rows), nn.Linear(WIDTH, WIDTH)
        self.heads, self.dim = HEADS, WIDTH // HEADS

    def forward(self, x):
        q, k, v = self.cut(self.qkv(x))
        y = (q @ k.transpose(-2, -1) * (1.0 / math.sqrt(k.size(-1)))).softmax(-1) @ v
        return self.out(y.transpose(1, 2).contiguous().flatten(2))


class NanoGPT(Fused):
    """nanoGPT's: split by the embedding's width, a causal mask."""

    def __init__(self):
        super().__init__()
        self.n_embd, self.n_head = WIDTH, HEADS
        self.register_buffer("bias", torch.tril(torch.ones(8, 8)).view(1, 1, 8, 8))

    def forward(self, x):
        b, n, c = x.size()
        q, k, v = (y.view(b, n, self.n_head, c // self.n_head).transpose(1, 2) for y in self.qkv(x).split(self.n_embd, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        y = F.softmax(scores.masked_fill(self.bias[:, :, :n, :n] == 0, float("-inf")), dim=-1) @ v
        return self.out(y.transpose(1, 2).contiguous().view(b, n, c))


class Chunks(Fused):
    """vit-pytorch's."""

    def cut(self, x):
        return (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in x.chunk(3, dim=-1))


class Neox(Fused):
    """GPT-NeoX's: of every head its queries, keys and values side by side."""

    def cut(self, x):
        return x.view(*x.shape[:2], self.heads, 3 * self.dim).transpose(1, 2).chunk(3, dim=-1)


class Sliced(Fused):
    """As GPT-NeoX's, by slices."""

    def cut(self, x):
        x = x.view(*x.shape[:2], self.heads, 3 * self.dim).transpose(1, 2)
        return x[..., : self.dim], x[..., self.dim : 2 * self.dim], x[..., 2 * self.dim :]


class FalconHeads(Fused):
    """falcon-rw's: heads, then three."""

    def cut(self, x):
        x = x.view(*x.shape[:2], self.heads, 3, self.dim)
        return (x[..., i, :].transpose(1, 2) for i in range(3))


class FalconMultiQuery(Fused):
    """falcon-7b's: all queries, then one key and one value."""

    rows = WIDTH + 2 * WIDTH // HEADS

    def cut(self, x):
        x = x.view(*x.shape[:2], self.heads + 2, self.dim)
        return (y.transpose(1, 2) for y in (x[..., :-2, :], x[..., [-2], :], x[..., [-1], :]))


class FalconGrouped(Fused):
    """falcon-40b's: for each key its queries, itself and its value."""

    rows = WIDTH + 4 * WIDTH // HEADS

    def cut(self, x):
        x = x.view(*x.shape[:2], -1, self.heads // 2 + 2, self.dim)
        q, k, v = x[:, :, :, :-2], x[:, :, :, [-2]], x[:, :, :, [-1]]
        k, v = (torch.broadcast_to(y, q.shape) for y in (k, v))
        return (y.flatten(2, 3).transpose(1, 2) for y in (q, k, v))


class Conv1D(nn.Module):
    """GPT-2's linear layer: the weight lies the other way round."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) * 0.2), nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


class GPT2(Fused):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.split_size = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH), WIDTH

    def cut(self, x):
        return (y.view(*y.shape[:-1], self.heads, self.dim).permute(0, 2, 1, 3) for y in x.split(self.split_size, dim=2))


class RMSNorm(nn.Module):
    """llama's."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(WIDTH)), 1e-6

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class GemmaNorm(RMSNorm):
    def forward(self, x):
        y = x.float()
        return ((y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)) * (1.0 + self.weight.float())).type_as(x)


class SumNorm(RMSNorm):
    def forward(self, x):
        return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + self.eps) * self.weight


class LengthNorm(RMSNorm):
    """lucidrains' RMSNorm: a unit vector times the square root of the width."""

    def forward(self, x):
        return F.normalize(x, dim=-1) * x.shape[-1] ** 0.5 * self.weight


class LayerNorm(RMSNorm):
    """The annotated transformer's: mean and standard deviation."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x):
        return self.weight * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + self.eps) + self.bias


class PictureNorm(LayerNorm):
    """ConvNeXt's over the channels of a picture."""

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ResponseNorm(LayerNorm):
    """ConvNeXt v2's GRN, channels last."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        g = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return (self.weight * (x * (g / (g.mean(dim=-1, keepdim=True) + 1e-6))) + self.bias + x).permute(0, 3, 1, 2)


class GroupNorm(LayerNorm):
    def forward(self, x):
        b, c, h, w = x.shape
        y = x.reshape(b, 4, -1)
        var, mean = torch.var_mean(y, dim=-1, keepdim=True, unbiased=False)
        return ((y - mean) * torch.rsqrt(var + 1e-5)).view(b, c, h, w) * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


class SpatialGate(nn.Module):
    """CBAM's: mean and largest channel say where to look."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x):
        seen = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.conv(seen))


class Standardized(nn.Conv2d):
    """Weight standardisation, as in Big Transfer."""

    def forward(self, x):
        w = self.weight
        var, mean = torch.var_mean(w, dim=[1, 2, 3], keepdim=True, unbiased=False)
        return F.conv2d(x, (w - mean) / torch.sqrt(var + 1e-5), self.bias, self.stride, self.padding, self.dilation, self.groups)


class Standardized2(nn.Conv2d):
    """The paper's own code."""

    def forward(self, x):
        w = self.weight
        w = w - w.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
        std = w.view(w.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, w / std.expand_as(w), self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledStandardized(nn.Conv2d):
    """NFNets', as timm writes it: batch norm standardises the rows of the weight."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 1.0))
        self.scale = self.weight[0].numel() ** -0.5

    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        w = F.batch_norm(rows, None, None, weight=(self.gain * self.scale).view(-1), training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, w.reshape_as(self.weight), self.bias, self.stride, self.padding, self.dilation, self.groups)


class Convs(nn.Module):
    """Two convolutions of a kind between group norms."""

    kind: type = Standardized

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = self.kind(WIDTH, 32, 3, padding=1), nn.GroupNorm(4, 32), self.kind(32, WIDTH, 3, padding=1)

    def forward(self, x):
        return x + self.b(torch.relu(self.norm(self.a(x))))


class Convs2(Convs):
    kind = Standardized2


class ScaledConvs(Convs):
    kind = ScaledStandardized


class WeightNormed(nn.Module):
    def __init__(self):
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.a, self.b = norm(nn.Conv2d(WIDTH, 32, 3, padding=1)), norm(nn.Conv2d(32, WIDTH, 3, padding=1))

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


class OwnLinear(nn.Module):
    """A linear layer without nn.Linear."""

    def __init__(self, into, out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, into) * 0.2), nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return x @ self.weight.t() + self.bias


class Feed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = OwnLinear(WIDTH, 40), OwnLinear(40, WIDTH)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class LowRank(nn.Linear):
    """LoRA on a weight, the two factors multiplied first."""

    def __init__(self, into, out, rank=4):
        super().__init__(into, out)
        self.down, self.up, self.scaling = nn.Parameter(torch.randn(rank, into)), nn.Parameter(torch.randn(out, rank)), 0.5

    def forward(self, x):
        return F.linear(x, self.weight + self.scaling * (self.up @ self.down), self.bias)


class LowRankFeed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = LowRank(WIDTH, 40), LowRank(40, WIDTH)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Gated(nn.Module):
    """SwiGLU with one projection for both halves."""

    def __init__(self):
        super().__init__()
        self.w12, self.w3 = nn.Linear(WIDTH, 80), nn.Linear(40, WIDTH)

    def forward(self, x):
        a, b = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(a) * b)


TOKENS = {
    "q.shape[-1] ** 0.5": Attention, "math.sqrt(q.size(-1))": SqrtOfSize, "torch.sqrt(torch.tensor)": SqrtOfTensor,
    "self.scale": StoredScale, "einsum": Einsums, "sdpa(scale=)": GivenScale, "cosine": Cosine, "bert": Bert, "grouped": Grouped,
    "multi-query": MultiQuery, "nanogpt": NanoGPT, "chunks": Chunks, "neox": Neox, "sliced": Sliced, "falcon-rw": FalconHeads,
    "falcon-7b": FalconMultiQuery, "falcon-40b": FalconGrouped, "gpt2": GPT2, "rms": RMSNorm, "gemma": GemmaNorm, "sum": SumNorm,
    "length": LengthNorm, "layer norm": LayerNorm, "torch's rms": lambda: nn.RMSNorm(WIDTH), "own linear": Feed,
    "lora": LowRankFeed, "swiglu": Gated,
}  # fmt: skip

PICTURES = {
    "picture norm": PictureNorm, "response norm": ResponseNorm, "group norm": GroupNorm, "spatial gate": SpatialGate,
    "standardised": Convs, "standardised, the paper's": Convs2, "scaled standardised": ScaledConvs, "weight norm": WeightNormed,
}  # fmt: skip


class TokenNet(nn.Module):
    """The rows of a picture as tokens, the block in a residual trunk, a head on their mean."""

    def __init__(self, block):
        super().__init__()
        self.embed, self.block, self.mid, self.head = nn.Linear(8, WIDTH), block, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x):
        x = self.embed(x[:, 0])
        return self.head(torch.relu(self.mid(x + self.block(x))).mean(1))


class PictureNet(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem, self.block, self.mid = nn.Conv2d(1, WIDTH, 3, padding=1), block, nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x):
        return self.head(torch.relu(self.mid(self.block(torch.relu(self.stem(x))))).mean((2, 3)))


def net_of(name):
    """The net that has the block `name`, and a batch for it."""
    torch.manual_seed(0)
    return TokenNet(TOKENS[name]()) if name in TOKENS else PictureNet(PICTURES[name]()), torch.randn(2, 1, 8, 8)
