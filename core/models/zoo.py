"""The networks that `--model` has names for: those of the papers, at the papers' sizes. None knows about widths."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hetfl.models.convnets import CNN, MLP, FedAvgCNN, FedConvCNN, FedConvHAR
from hetfl.models.deep_convnets import GoogLeNet, MobileNetV2, PreResNet, ResNet
from hetfl.models.sequences import LSTM, CNN1d, Decoder, Encoder

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
    "decoder": Decoder,
    "lstm": LSTM,
    "cnn1d": CNN1d,
}


def in_zoo(name: str) -> bool:
    """Whether the zoo has `name`: such a model can be built without an example of its inputs."""
    return name in ZOO
