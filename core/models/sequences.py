"""Networks for token ids (N, length) and sensor windows (N, 1, steps, sensors): encoder, decoder, LSTM, 1-D CNN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetfl.models.convnets import Shape, sides


class Attention(nn.Module):
    """Multi-head self-attention over (N, L, width); `mask` (bool, (…, L, L)) is False where a position does not see another."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class EncoderLayer(nn.Module):
    """Attention and GELU network, normalised after each residual sum (post-LN)."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.norm1 = Attention(width, heads, dropout), nn.LayerNorm(width, 1e-5)
        self.up, self.down, self.norm2 = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.LayerNorm(width, 1e-5)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.drop(self.attention(x, mask)))
        out: Tensor = self.norm2(x + self.drop(self.down(F.gelu(self.up(x)))))
        return out


class Encoder(nn.Module):
    """RoBERTa-style classifier of token ids (N, length), where `pad` is padding: learned positions, post-LN layers, GELU, dense +
    tanh head.

    At RoBERTa-base's sizes (vocab 50265, length 514, width 768, layers 12, heads 12, hidden 3072) and 4 classes 124,647,940
    parameters: RoBERTa's 124,648,708 without its one-row token-type embedding. The tokenizer puts a start token first, whose
    position is what the head reads.
    """

    def __init__(
        self, classes: int, vocab: int, length: int, width: int = 128, layers: int = 2, heads: int = 4, hidden: int = 0,
        dropout: float = 0.1, pad: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.tokens, self.places = nn.Embedding(vocab, width, padding_idx=pad), nn.Embedding(length, width)
        self.pad = pad
        self.norm, self.drop = nn.LayerNorm(width, 1e-5), nn.Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, hidden or 4 * width, dropout) for _ in range(layers))
        self.dense, self.head = nn.Linear(width, width), nn.Linear(width, classes)
        self.apply(init_as_roberta)

    def forward(self, ids: Tensor) -> Tensor:
        position = torch.arange(ids.shape[1], device=ids.device)
        x, mask = self.drop(self.norm(self.tokens(ids) + self.places(position))), (ids != self.pad)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask)
        out: Tensor = self.head(self.drop(torch.tanh(self.dense(self.drop(x[:, 0])))))
        return out


class DecoderLayer(nn.Module):
    """Attention and GELU network, each after a norm (pre-LN)."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, dropout)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), mask))
        out: Tensor = x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))
        return out


class Decoder(nn.Module):
    """GPT-2-style language model of token ids (N, length): learned positions, pre-LN layers, GELU; logits (N, length, classes)
    of the token after each, of which it sees none. Padding comes last, so nothing that is to be predicted sees it."""

    def __init__(
        self, classes: int, vocab: int, length: int, width: int = 64, layers: int = 2, heads: int = 4, hidden: int = 0,
        dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.tokens, self.places, self.drop = nn.Embedding(vocab, width), nn.Embedding(length, width), nn.Dropout(dropout)
        self.layers = nn.ModuleList(DecoderLayer(width, heads, hidden or 4 * width, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        self.apply(init_as_roberta)

    def forward(self, ids: Tensor) -> Tensor:
        position = torch.arange(ids.shape[1], device=ids.device)
        x, mask = self.drop(self.tokens(ids) + self.places(position)), position[:, None] >= position
        for layer in self.layers:
            x = layer(x, mask)
        out: Tensor = self.head(self.norm(x))
        return out


def init_as_roberta(layer: nn.Module) -> None:
    """Initialises a layer as RoBERTa does: weights of linear layers and embeddings from N(0, 0.02^2), no biases, padding 0."""
    if isinstance(layer, nn.Linear | nn.Embedding):
        nn.init.normal_(layer.weight, 0.0, 0.02)
    if isinstance(layer, nn.Linear):
        nn.init.zeros_(layer.bias)
    if isinstance(layer, nn.Embedding) and layer.padding_idx is not None:
        with torch.no_grad():
            layer.weight[layer.padding_idx] = 0


class LSTM(nn.Module):
    """LSTM over sensor windows (N, 1, steps, sensors); the last hidden state is classified."""

    def __init__(self, classes: int, channels: int, size: Shape, hidden: int = 64, layers: int = 1) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels * sides(size)[1], hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x.transpose(1, 2).flatten(2))[0][:, -1])
        return out


class CNN1d(nn.Module):
    """1-D CNN over sensor windows (N, 1, steps, sensors): convolutions over the steps, global pooling."""

    def __init__(self, classes: int, channels: int, size: Shape, widths: Sequence[int] = (64, 128, 128), kernel: int = 5) -> None:
        super().__init__()
        inputs, layers = channels * sides(size)[1], []
        for width in widths:
            layers += [nn.Conv1d(inputs, width, kernel, padding=kernel // 2), nn.ReLU(), nn.MaxPool1d(2, ceil_mode=True)]
            inputs = width
        self.body = nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(inputs, classes))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x.transpose(1, 2).flatten(2).transpose(1, 2))
        return out
