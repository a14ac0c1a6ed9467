"""Builds the smaller module of the units that a submodel keeps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hetfl.models.state import named_tensors
from hetfl.submodel.blocks import take
from hetfl.submodel.widths import Kept, Widths


def build_submodel(widths: Widths, model: nn.Module, kept: Kept, shared: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy of `model` whose tensors are its blocks at `kept`, with parameters of its own; the tensors `shared` are as they are.

    Attributes of layers that repeat a size (features, channels, groups, normalized_shape, heads) follow. A `model` of meta tensors
    gives one of meta tensors.
    """
    memo: dict[int, Any] = {}
    index, whole = widths.cuts(kept), widths.whole(kept)
    for name, tensor in named_tensors(model).items():
        if shared and name in shared:
            memo[id(tensor)] = shared[name]
            continue
        small = take(tensor.detach(), index.get(name, {})).clone()
        memo[id(tensor)] = nn.Parameter(small, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else small
    small_model = copy.deepcopy(model, memo)
    present = {path for path, _ in small_model.named_modules()}
    for (path, attribute), (counted, share) in widths.sizes.items():
        if path in present and not counted.present <= whole:
            set_size(small_model.get_submodule(path), attribute, int(len(counted.index(kept)) / share))
    for layer in small_model.modules():
        refit_layer(layer)
    return small_model


def set_size(module: nn.Module, attribute: str, size: int) -> None:
    """Sets an attribute that counts channels; one that is a shape keeps its form."""
    setattr(module, attribute, (size,) if isinstance(getattr(module, attribute, None), tuple) else size)


def refit_layer(layer: nn.Module) -> None:
    """Sets the size attributes of one of torch's layers to the shapes of its tensors."""
    shape = shape_of(layer, "weight")
    if isinstance(layer, nn.RNNBase):
        layer.input_size = shape_of(layer, "weight_ih_l0")[1]
    elif isinstance(layer, nn.RNNCellBase):
        layer.input_size = shape_of(layer, "weight_ih")[1]
    elif not shape:
        return
    elif isinstance(layer, nn.modules.conv._ConvNd):
        refit_conv(layer, shape)
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif isinstance(layer, nn.modules.batchnorm._NormBase):
        layer.num_features = shape[0]
    elif isinstance(layer, nn.LayerNorm | nn.RMSNorm):
        layer.normalized_shape = tuple(shape)
    elif isinstance(layer, nn.GroupNorm):
        layer.num_channels = shape[0]
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = shape[1]


def shape_of(layer: nn.Module, name: str) -> torch.Size:
    """The shape of a layer's tensor, empty where it has none; nothing is cast for it (models/casting.py)."""
    held = layer._buffers.get(name)
    tensor = getattr(layer, name, None) if held is None else held
    return tensor.shape if isinstance(tensor, Tensor) else torch.Size()


def refit_conv(layer: nn.modules.conv._ConvNd, shape: torch.Size) -> None:
    """Sets a convolution's numbers of channels by its weight's shape (out, in / groups, …), transposed (in, out / groups, …)."""
    o, i = (1, 0) if layer.transposed else (0, 1)
    layer.out_channels = shape[o] * (layer.groups if layer.transposed else 1)
    layer.in_channels = shape[i] * (1 if layer.transposed else layer.groups)
