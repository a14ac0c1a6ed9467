"""Deep networks for 32x32 images: pre-activation ResNet, ResNet, GoogLeNet, MobileNetV2."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


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
        body = build_stages(PreBlock, widths, blocks)
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
        super().__init__(*stem, *build_stages(Block, widths, blocks), *head)


def build_stages(block: Callable[[int, int, int], nn.Module], widths: Sequence[int], blocks: Sequence[int]) -> list[nn.Module]:
    """The residual stages: `blocks[i]` blocks of `widths[i]` channels, halving the resolution from the second stage on."""
    made, inputs = [], widths[0]
    for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        for i in range(count):
            made.append(block(inputs, width, 2 if stage and i == 0 else 1))
            inputs = width
    return made


class ConvNormReLU(nn.Sequential):
    """Convolution with bias, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.BatchNorm2d(outputs), nn.ReLU())


class Inception(nn.Module):
    """Four branches side by side: 1x1, 3x3, two 3x3 in place of 5x5, pooled 1x1 (Szegedy et al., 2014 and 2015)."""

    def __init__(self, inputs: int, one: int, pre3: int, three: int, pre5: int, five: int, pooled: int) -> None:
        super().__init__()
        self.one = ConvNormReLU(inputs, one, 1)
        self.three = nn.Sequential(ConvNormReLU(inputs, pre3, 1), ConvNormReLU(pre3, three, 3))
        self.five = nn.Sequential(ConvNormReLU(inputs, pre5, 1), ConvNormReLU(pre5, five, 3), ConvNormReLU(five, five, 3))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), ConvNormReLU(inputs, pooled, 1))

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
        layers: list[nn.Module] = [ConvNormReLU(channels, width, 3)]
        for row in BRANCHES:
            if isinstance(row, int):
                layers.append(nn.MaxPool2d(3, 2, 1))
            else:
                branches = [max(1, w // shrink) for w in row]
                layers.append(Inception(width, *branches))
                width = branches[0] + branches[2] + branches[4] + branches[5]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


class InvertedResidual(nn.Module):
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
                layers.append(InvertedResidual(inputs, int(outputs * width), stride if i == 0 else 1, expansion))
                inputs = int(outputs * width)
        layers += [nn.Conv2d(inputs, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Dropout(0.2), nn.Linear(last, classes))
