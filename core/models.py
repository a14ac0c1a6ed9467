"""The zoo: the papers' networks at the papers' sizes, and any `package.module:factory`. None knows about widths."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from hetfl.core.errors import UsageError, nearest, unknown
from hetfl.core.streams import seed_of

NAMES = {
    "classes": ("classes", "num_classes", "n_classes"),
    "channels": ("channels", "in_channels", "in_chans"),
    "size": ("size", "image_size", "img_size"),
}


class MLP(nn.Sequential):
    """Fully connected ReLU network over the flattened input."""

    def __init__(self, classes: int, channels: int, size: int, hidden: Sequence[int] = (200, 200)) -> None:
        widths = [channels * area(size), *hidden]
        layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.ReLU())]
        super().__init__(nn.Flatten(), *layers, nn.Linear(widths[-1], classes))


class FedConvCNN(nn.Sequential):
    """FedConv's two-convolution net: 20,490 parameters on MNIST (spec fedconv 3), 6,090 on the 8x8 digits."""

    def __init__(self, classes: int, channels: int, size: int, widths: Sequence[int] = (16, 32)) -> None:
        convs, channels = [], channels
        for width in widths:
            convs += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels, size = width, half(size)
        super().__init__(*convs, nn.Flatten(), nn.Linear(channels * area(size), classes))


class FedAvgCNN(nn.Sequential):
    """McMahan et al.'s net: two 5x5 convolutions and 512 hidden units, 1,663,370 parameters on MNIST."""

    def __init__(
        self, classes: int, channels: int, size: int, widths: Sequence[int] = (32, 64), hidden: int = 512, kernel: int = 5
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


ZOO: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLP,
    "fedconv-cnn": FedConvCNN,
    "fedavg-cnn": FedAvgCNN,
    "cnn": CNN,
    "preresnet18": PreResNet,
    "resnet18": ResNet,
}


def area(size: int | tuple[int, int]) -> int:
    return size * size if isinstance(size, int) else size[0] * size[1]


def half(size: Any) -> Any:
    return size // 2 if isinstance(size, int) else tuple(s // 2 for s in size)


def default(shape: tuple[int, ...]) -> str:
    """The model a run takes for inputs of `shape` (C, H, W) when none is named."""
    return "fedconv-cnn" if shape[0] == 1 else "resnet18"


def build(name: str, args: dict[str, Any], classes: int, shape: tuple[int, ...], seed: int) -> nn.Module:
    """The model `name` with weights drawn from the stream (seed, "init"); `shape` is that of one input.

    Raises UsageError for an unknown name, a factory that cannot be imported or that refuses its arguments.
    """
    factory = find(name)
    given = arguments(factory, classes, shape, args)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed, "init"))
        try:
            model = factory(**given)
        except Exception as error:
            shown = ", ".join(f"{k}={v!r}" for k, v in given.items())
            raise UsageError(f"model '{name}' could not be built with {shown}: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model factory '{name}' returned {type(model).__name__}, not a torch.nn.Module")
    return model


def find(name: str) -> Callable[..., nn.Module]:
    """The factory behind a zoo name or `package.module:factory` (looked up in the current directory too)."""
    if ":" not in name:
        if name not in ZOO:
            raise unknown("model", name, [*ZOO, "package.module:factory"])
        return ZOO[name]
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:
        raise UsageError(f"model module '{module}' cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UsageError(f"module '{module}' has no factory '{attribute}'{nearest(attribute, dir(sys.modules[module]))}")
    made: Callable[..., nn.Module] = found
    return made


def arguments(factory: Callable[..., nn.Module], classes: int, shape: tuple[int, ...], args: dict[str, Any]) -> dict[str, Any]:
    """What to call `factory` with: those of classes, channels and size that its signature names, then `args`."""
    parameters = inspect.signature(factory).parameters
    size: Any = shape[1] if len(set(shape[1:])) == 1 else tuple(shape[1:])
    known = {"classes": classes, "channels": shape[0], "size": size}
    given = {name: known[what] for what, names in NAMES.items() for name in names if name in parameters}
    free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    for name in args:
        if name not in parameters and not free:
            raise UsageError(f"unknown model argument '{name}'{nearest(name, parameters)} (known: {', '.join(parameters)})")
    return {**given, **args}
