"""Proof by trial that width groups may be cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hetfl.models.state import load_state, tensors
from hetfl.rng import stream
from hetfl.submodel.blocks import put, take
from hetfl.submodel.slicing import build
from hetfl.submodel.tracing.channels import name_of
from hetfl.submodel.widths import Group, Kept, Widths, without

TOLERANCE = 1e-4


def prove(widths: Widths, model: nn.Module, inputs: Sequence[Tensor]) -> Widths:
    """`widths` without the groups whose cut changes what the model computes, or keeps it from running."""
    sure = {g.name for g in provable(widths, model, inputs, widths.groups, ())}
    reason = "a cut changes the output: its size is fixed in the code"
    return without(widths, {g.name: reason for g in widths.groups if g.name not in sure})


def provable(
    widths: Widths, model: nn.Module, inputs: Sequence[Tensor], groups: Sequence[Group], sure: Sequence[Group]
) -> Sequence[Group]:
    """`sure`, groups that can be cut together, and as many of `groups` as can be cut with them, found by halving."""
    if not groups or exact(widths, model, inputs, [*sure, *groups]):
        return [*sure, *groups]
    if len(groups) == 1:
        return sure
    half = len(groups) // 2
    return provable(widths, model, inputs, groups[half:], provable(widths, model, inputs, groups[:half], sure))


def exact(widths: Widths, model: nn.Module, inputs: Sequence[Tensor], groups: Sequence[Group]) -> bool:
    """Whether `model` can be cut in `groups`, twice at random, and also trains so."""
    return all(holds(widths, model, inputs, {g.name for g in groups}, stream(0, "prove", draw)) for draw in range(2))


def holds(widths: Widths, model: nn.Module, inputs: Sequence[Tensor], cut: set[str], generator: torch.Generator) -> bool:
    kept = {g.name: chosen(g.size, generator) if g.name in cut else torch.arange(g.size) for g in widths.groups}
    try:
        small, error = compared(widths, model, inputs, kept, generator)
        small.train()(*inputs)
    except Exception:
        return False
    return error <= TOLERANCE


def chosen(size: int, generator: torch.Generator) -> Tensor:
    """Between 2 (a single one would broadcast) and all but one of `size` units, in random order."""
    fewest = min(2, size - 1)
    count = int(torch.randint(fewest, max(size, fewest + 1), (1,), generator=generator))
    return torch.randperm(size, generator=generator)[:count]


def compared(
    widths: Widths, model: nn.Module, inputs: Sequence[Tensor], kept: Kept, generator: torch.Generator
) -> tuple[nn.Module, float]:
    """The model cut to `kept`, and by how much its outputs differ from those of the full one with the other entries zero.

    The weights are random; the difference is relative to 1 + the largest output. Normalisation over channels is left out.
    """
    index = widths.index(kept)
    state = {name: noise(name, t, generator) for name, t in tensors(model).items()}
    small_state = {name: take(t, index.get(name, {})) for name, t in state.items()}
    masked = {name: put(small_state[name], index.get(name, {}), torch.zeros_like(t)) for name, t in state.items()}
    small = load_state(build(widths, model, kept), small_state).eval()
    with Plain(), torch.no_grad():
        whole = leaves(torch.func.functional_call(model.eval(), masked, tuple(inputs)))
        ours = leaves(small(*inputs))
    return small, max((difference(a, b) for a, b in zip(whole, ours, strict=True)), default=math.inf)


def difference(a: Tensor, b: Tensor) -> float:
    error = float((a - b).abs().max() / (1 + a.abs().max())) if a.shape == b.shape else math.inf
    return error if error == error else math.inf


def noise(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random values of a plausible scale, so that no zero or equal entry hides a wrong cut."""
    if not tensor.is_floating_point():
        return tensor
    fan = math.sqrt(max(1, tensor[0].numel())) if tensor.ndim > 1 else 1.0
    drawn = torch.randn(tensor.shape, generator=generator).to(tensor) / fan
    return drawn.abs() + 0.5 if name.endswith("var") else drawn


def leaves(out: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


class Plain(TorchFunctionMode):
    """Leaves out what legitimately differs between a cut and a masked model: normalisation over channels, 1 / sqrt(head width).

    Squashing each value stands in for the normalisation, so that deep models stay in the range of floats.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name in ("layer_norm", "rms_norm", "group_norm"):
            named = ("input", "_", "weight", "bias") if name != "rms_norm" else ("input", "_", "weight")
            given = {**dict(zip(named, args, strict=False)), **kwargs}
            shape = (1, -1) + (1,) * (given["input"].ndim - 2) if name == "group_norm" else (-1,)
            weight, bias = given.get("weight"), given.get("bias")
            out = F.softsign(given["input"])
            out = out if weight is None else out * weight.reshape(shape)
            return out if bias is None else out + bias.reshape(shape)
        if name == "scaled_dot_product_attention":
            return F.scaled_dot_product_attention(*args, **{**kwargs, "scale": 1.0})
        if name == "multi_head_attention_forward":
            return func(*unscaled(list(args)), **kwargs)
        return func(*args, **kwargs)


def unscaled(args: list[Any]) -> list[Any]:
    """The arguments of multi_head_attention_forward with queries that make up for the 1 / sqrt(width) of a head."""
    size, heads, packed, bias = args[3:7]
    scale = math.sqrt(size / heads)
    if packed is not None:
        factor = torch.cat([torch.full((size,), scale), torch.ones(2 * size)]).to(packed)
        args[5], args[6] = packed * factor[:, None], None if bias is None else bias * factor
    return args
