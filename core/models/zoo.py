"""The zoo: the papers' networks at the papers' sizes. None knows about widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shape = int | tuple[int, ...]  # of an image or window: its side, or its height and width


class MLP(nn.Sequential):
    """Fully connected ReLU network over the flattened input."""

    def __init__(self, classes: int, channels: int, size: Shape, hidden: Sequence[int] = (200, 200)) -> None:
        widths = [channels * area(size), *hidden]
        layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
        super().__init__(nn.Flatten(), *layers, nn.Linear(widths[-1], classes))


class FedConvCNN(nn.Sequential):
    """FedConv's two-convolution net: 20,490 parameters on MNIST, 17,765 on depth images (spec fedconv 3), 6,090 on the 8x8 digits.

    For WiAR's 90x250 the layers are not on record; this net is our reading of "2-conv CNN".
    """

    def __init__(self, classes: int, channels: int, size: Shape, widths: Sequence[int] = (16, 32)) -> None:
        convs, channels = [], channels
        for width in widths:
            convs += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = width, half(size)
        super().__init__(*convs, nn.Flatten(), nn.Linear(channels * area(size), classes))


class FedAvgCNN(nn.Sequential):
    """McMahan et al.'s net: two 5x5 convolutions and 512 hidden units, 1,663,370 parameters on MNIST."""

    def __init__(
        self, classes: int, channels: int, size: Shape, widths: Sequence[int] = (32, 64), hidden: int = 512, kernel: int = 5
    ) -> None:
        convs, channels = [], channels
        for width in widths:
            convs += [nn.Conv2d(channels, width, kernel, padding=kernel // 2), nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = width, half(size)
        head = [nn.Linear(channels * area(size), hidden), nn.ReLU(), nn.Linear(hidden, classes)]
        super().__init__(*convs, nn.Flatten(), *head)


class CNN(nn.Sequential):
    """HeteroFL's CNN: 3x3 convolutions with batch norm, global pooling; 1,556,874 parameters on MNIST (spec heterofl 6.1)."""

    def __init__(self, classes: int, channels: int, widths: Sequence[int] = (64, 128, 256, 512)) -> None:
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        super().__init__(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class PreBlock(nn.Module):
    """Pre-activation residual block; the shortcut convolution reads the activated input (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 or inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.norm1(x))
        short = x if self.shortcut is None else self.shortcut(out)
        added: Tensor = short + self.conv2(torch.relu(self.norm2(self.conv1(out))))
        return added


class PreResNet(nn.Sequential):
    """HeteroFL's pre-activation ResNet18: 11,172,170 parameters; blocks (1, 1, 1, 2) give the paper's 9,622,090."""

    def __init__(
        self, classes: int, channels: int, widths: Sequence[int] = (64, 128, 256, 512), blocks: Sequence[int] = (2, 2, 2, 2)
    ) -> None:
        stem = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        body = stages(PreBlock, widths, blocks)
        head = [nn.BatchNorm2d(widths[-1]), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
        super().__init__(stem, *body, *head)


class Block(nn.Module):
    """Post-activation residual block with a projection where the shape changes (He et al., 2015)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        project = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Identity() if same else nn.Sequential(*project)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


class ResNet(nn.Sequential):
    """ResNet18 for 32x32 images: 3x3 stem, no stem pooling; 11,173,962 parameters for 3 channels and 10 classes."""

    def __init__(
        self, classes: int, channels: int, widths: Sequence[int] = (64, 128, 256, 512), blocks: Sequence[int] = (2, 2, 2, 2)
    ) -> None:
        stem = [nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()]
        head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)]
        super().__init__(*stem, *stages(Block, widths, blocks), *head)


def stages(block: Callable[[int, int, int], nn.Module], widths: Sequence[int], blocks: Sequence[int]) -> list[nn.Module]:
    """The residual stages: `blocks[i]` blocks of `widths[i]` channels, halving the resolution from the second stage on."""
    made, inputs = [], widths[0]
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for i in range(count):
            made.append(block(inputs, width, 2 if stage and i == 0 else 1))
            inputs = width
    return made


class FedConvHAR(nn.Sequential):
    """FedConv's net for HARBox's 30x30: stride-2 convolutions, batch norm whose affine part is frozen at (1, 0) (spec fedconv 3).

    15,141 parameters for 5 classes.
    """

    def __init__(self, classes: int, channels: int, size: Shape, widths: Sequence[int] = (16, 32)) -> None:
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, 2, 1), still(nn.BatchNorm2d(width)), nn.ReLU()]
            channels, size = width, half(up(size))
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels * area(size), classes))


def still(layer: nn.Module) -> nn.Module:
    """`layer` with parameters that are not trained."""
    return layer.requires_grad_(False)


class Convolved(nn.Sequential):
    """Convolution with bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU())


class Inception(nn.Module):
    """Four branches side by side: 1x1, 3x3, two 3x3 in place of 5x5, pooled 1x1 (Szegedy et al., 2014 and 2015)."""

    def __init__(self, inputs: int, one: int, pre3: int, three: int, pre5: int, five: int, pooled: int) -> None:
        super().__init__()
        self.one = Convolved(inputs, one, 1)
        self.three = nn.Sequential(Convolved(inputs, pre3, 1), Convolved(pre3, three, 3))
        self.five = nn.Sequential(Convolved(inputs, pre5, 1), Convolved(pre5, five, 3), Convolved(five, five, 3))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), Convolved(inputs, pooled, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pooled(x)], 1)


BRANCHES = (  # 1x1, 3x3 reduced, 3x3, 5x5 reduced, 5x5, pooled; 0: halve the resolution (Szegedy et al., 2014, table 1)
    (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64), 0,
    (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128), 0, (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
)  # fmt: skip


class GoogLeNet(nn.Sequential):
    """GoogLeNet for 32x32 images: one 3x3 convolution as stem, no auxiliary heads; 6,166,250 parameters for 10 classes.

    `shrink` divides all widths.
    """

    def __init__(self, classes: int, channels: int, shrink: int = 1) -> None:
        width = 192 // shrink
        layers: list[nn.Module] = [Convolved(channels, width, 3)]
        for row in BRANCHES:
            if isinstance(row, int):
                layers.append(nn.MaxPool2d(3, 2, 1))
            else:
                branches = [max(1, w // shrink) for w in row]
                layers.append(Inception(width, *branches))
                width = branches[0] + branches[2] + branches[4] + branches[5]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class Inverted(nn.Module):
    """Inverted residual: expand 1x1, depthwise 3x3, project 1x1 (Sandler et al., 2018)."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        depthwise = [nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        project = [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.body = nn.Sequential(*(expand if expansion > 1 else []), *depthwise, *project)
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.same else out


STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class MobileNetV2(nn.Sequential):
    """MobileNetV2 (DAC's base) for 32x32 images: stem and second stage keep the resolution; 2,236,682 parameters for 10 classes.

    `width` multiplies all widths. `stages` are (expansion, width, blocks, stride).
    """

    def __init__(
        self, classes: int, channels: int, width: float = 1.0, stages: Sequence[Sequence[int]] = STAGES, last: int = 1280
    ) -> None:
        inputs = int(32 * width)
        layers: list[nn.Module] = [nn.Conv2d(channels, inputs, 3, 1, 1, bias=False), nn.BatchNorm2d(inputs), nn.ReLU6()]
        for expansion, outputs, count, stride in stages:
            for i in range(count):
                layers.append(Inverted(inputs, int(outputs * width), stride if i == 0 else 1, expansion))
                inputs = int(outputs * width)
        layers += [nn.Conv2d(inputs, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Dropout(0.2), nn.Linear(last, classes))


class Attention(nn.Module):
    """Multi-head self-attention over (N, L, width); padded places are not looked at."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, seen, self.dropout if self.training else 0.0)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class EncoderLayer(nn.Module):
    """Attention and GELU network, normalised after each residual sum (post-LN)."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.norm1 = Attention(width, heads, dropout), nn.LayerNorm(width, 1e-5)
        self.up, self.down, self.norm2 = nn.Linear(width, hidden), nn.Linear(hidden, width), nn.LayerNorm(width, 1e-5)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        x = self.norm1(x + self.drop(self.attention(x, seen)))
        out: Tensor = self.norm2(x + self.drop(self.down(F.gelu(self.up(x)))))
        return out


class Encoder(nn.Module):
    """RoBERTa-style classifier of token ids (N, length), 0 = padding: learned positions, post-LN layers, GELU, dense + tanh head.

    At RoBERTa-base's sizes (vocab 50265, length 514, width 768, layers 12, heads 12, hidden 3072) and 4 classes 124,647,940
    parameters: RoBERTa's 124,648,708 without its one-row token-type embedding. The tokenizer puts a start token first, whose
    place is what the head reads.
    """

    def __init__(
        self, classes: int, vocab: int, length: int, width: int = 128, layers: int = 2, heads: int = 4, hidden: int = 0,
        dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.tokens, self.places = nn.Embedding(vocab, width, padding_idx=0), nn.Embedding(length, width)
        self.norm, self.drop = nn.LayerNorm(width, 1e-5), nn.Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(width, heads, hidden or 4 * width, dropout) for _ in range(layers))
        self.dense, self.head = nn.Linear(width, width), nn.Linear(width, classes)
        self.apply(small)

    def forward(self, ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1], device=ids.device)
        x, seen = self.drop(self.norm(self.tokens(ids) + self.places(place))), (ids != 0)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, seen)
        out: Tensor = self.head(self.drop(torch.tanh(self.dense(self.drop(x[:, 0])))))
        return out


def small(layer: nn.Module) -> None:
    """RoBERTa's start: weights of linear layers and embeddings from N(0, 0.02^2), no biases, padding 0."""
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


ZOO: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "fedconv-cnn": FedConvCNN,
    "fedconv-har": FedConvHAR,
    "fedavg-cnn": FedAvgCNN,
    "cnn": CNN,
    "preresnet18": PreResNet,
    "resnet18": ResNet,
    "googlenet": GoogLeNet,
    "mobilenetv2": MobileNetV2,
    "encoder": Encoder,
    "lstm": LSTM,
    "cnn1d": CNN1d,
}


def sides(size: Shape) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def area(size: Shape) -> int:
    height, width = sides(size)
    return height * width


def half(size: Shape) -> Shape:
    return tuple(s // 2 for s in sides(size))


def up(size: Shape) -> Shape:
    """One more, so that `half` rounds up as a strided convolution does."""
    return tuple(s + 1 for s in sides(size))


def in_zoo(name: str) -> bool:
    """Whether a model's name alone says what it is: it needs no example to be built."""
    return name in ZOO
