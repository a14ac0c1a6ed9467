"""Feed-forward networks of a few layers for images (N, channels, height, width): a perceptron and the papers' small CNNs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

Shape = int | tuple[int, ...]  # of an image or window: its side, or its height and width; () of a vector


def sides(size: Shape) -> tuple[int, ...]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else tuple(size)


def area(size: Shape) -> int:
    """The number of positions; 1 for a vector, which has none but its channels."""
    return math.prod(sides(size))


def half(size: Shape) -> Shape:
    """The size after pooling by 2, rounded down."""
    return tuple(s // 2 for s in sides(size))


class MLP(nn.Sequential):
    """Fully connected ReLU network over the flattened input: images (N, channels, height, width), vectors (N, channels)."""

    def __init__(self, classes: int, channels: int, size: Shape, hidden: Sequence[int] = (200, 200)) -> None:
        widths = [channels * area(size), *hidden]
        layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
        super().__init__(nn.Flatten(), *layers, nn.Linear(widths[-1], classes))


class FedConvCNN(nn.Sequential):
    """FedConv's two-convolution net: 20,490 parameters on MNIST, 17,765 on depth images (spec fedconv 3), 6,090 on the 8x8 digits.

    For WiAR's 90x250 the layers are not on record; this net is our reading of "2-conv CNN".
    """

    def __init__(self, classes: int, channels: int, size: Shape, widths: Sequence[int] = (16, 32)) -> None:
        convs: list[nn.Module] = []
        for width in widths:
            convs += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = width, half(size)
        super().__init__(*convs, nn.Flatten(), nn.Linear(channels * area(size), classes))


class FedAvgCNN(nn.Sequential):
    """McMahan et al.'s net: two 5x5 convolutions and 512 hidden units, 1,663,370 parameters on MNIST.

    With `widths` (8, 16) and `hidden` (120, 84) it is a LeNet with padding.
    """

    def __init__(
        self,
        classes: int,
        channels: int,
        size: Shape,
        widths: Sequence[int] = (32, 64),
        hidden: int | Sequence[int] = 512,
        kernel: int = 5,
    ) -> None:
        convs: list[nn.Module] = []
        for width in widths:
            convs += [nn.Conv2d(channels, width, kernel, padding=kernel // 2), nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = width, half(size)
        dense = [channels * area(size), *([hidden] if isinstance(hidden, int) else hidden)]
        head = [m for i, o in pairwise(dense) for m in (nn.Linear(i, o), nn.ReLU())]
        super().__init__(*convs, nn.Flatten(), *head, nn.Linear(dense[-1], classes))


class CNN(nn.Sequential):
    """HeteroFL's CNN: 3x3 convolutions with batch norm, global pooling; 1,556,874 parameters on MNIST (spec heterofl 6.1)."""

    def __init__(self, classes: int, channels: int, widths: Sequence[int] = (64, 128, 256, 512)) -> None:
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        super().__init__(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class FedConvHAR(nn.Sequential):
    """FedConv's net for HARBox's 30x30: stride-2 convolutions, batch norm whose affine part is frozen at (1, 0) (spec fedconv 3).

    15,141 parameters for 5 classes.
    """

    def __init__(self, classes: int, channels: int, size: Shape, widths: Sequence[int] = (16, 32)) -> None:
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width).requires_grad_(False), nn.ReLU()]
            channels, size = width, tuple((s + 1) // 2 for s in sides(size))
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels * area(size), classes))
