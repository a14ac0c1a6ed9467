"""Proof by trial that width groups may be cut: a cut model must compute what the full one does with the removed entries zero."""

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
from hetfl.submodel.slicing import build_submodel
from hetfl.submodel.tracing.channels import op_name
from hetfl.submodel.widths import Group, Kept, Widths, freeze_groups

TOLERANCE = 1e-4  # of the largest difference of outputs, relative to 1 + the largest output


def prove(widths: Widths, model: nn.Module, inputs: Sequence[Tensor]) -> Widths:
    """`widths` without the groups whose cut changes what the model computes, or keeps it from running."""
    proven = {g.name for g in find_provable(widths, model, inputs, widths.groups, ())}
    reason = "a cut changes the output: its size is fixed in the code"
    return freeze_groups(widths, {g.name: reason for g in widths.groups if g.name not in proven})


def find_provable(
    widths: Widths, model: nn.Module, inputs: Sequence[Tensor], groups: Sequence[Group], proven: Sequence[Group]
) -> Sequence[Group]:
    """`proven`, groups that can be cut together, and as many of `groups` as can be cut with them, found by halving."""
    if not groups or are_exact(widths, model, inputs, [*proven, *groups]):
        return [*proven, *groups]
    if len(groups) == 1:
        return proven
    half = len(groups) // 2
    return find_provable(widths, model, inputs, groups[half:], find_provable(widths, model, inputs, groups[:half], proven))


def are_exact(widths: Widths, model: nn.Module, inputs: Sequence[Tensor], groups: Sequence[Group]) -> bool:
    """Whether two random cuts of `groups` both compute what the masked full model does (to TOLERANCE), and run in training mode."""
    cut = {g.name for g in groups}
    for draw in range(2):
        generator = stream(0, "prove", draw)
        kept = {g.name: draw_units(g.size, generator) if g.name in cut else torch.arange(g.size) for g in widths.groups}
        try:
            small, error = compare_cut(widths, model, inputs, kept, generator)
            small.train()(*inputs)
        except Exception:
            return False
        if error > TOLERANCE:
            return False
    return True


def draw_units(size: int, generator: torch.Generator) -> Tensor:
    """Between 2 (a single one would broadcast) and all but one of `size` units, in random order, shape (number,)."""
    fewest = min(2, size - 1)
    count = int(torch.randint(fewest, max(size, fewest + 1), (1,), generator=generator))
    return torch.randperm(size, generator=generator)[:count]


def compare_cut(
    widths: Widths, model: nn.Module, inputs: Sequence[Tensor], kept: Kept, generator: torch.Generator
) -> tuple[nn.Module, float]:
    """(the model cut to `kept`, the largest difference of its outputs from those of the full one with the other entries zero).

    The weights of both are random; the difference is relative to 1 + the largest output, infinite where shapes differ or something
    is not a number. What rightly differs is left out of both (`WithoutNormalization`).
    """
    index = widths.index(kept)
    state = {name: draw_values(name, t, generator) for name, t in tensors(model).items()}
    small_state = {name: take(t, index.get(name, {})) for name, t in state.items()}
    masked = {name: put(small_state[name], index.get(name, {}), torch.zeros_like(t)) for name, t in state.items()}
    small = load_state(build_submodel(widths, model, kept), small_state).eval()
    with WithoutNormalization(), torch.no_grad():
        whole = float_leaves(torch.func.functional_call(model.eval(), masked, tuple(inputs)))
        ours = float_leaves(small(*inputs))
    return small, max((relative_error(a, b) for a, b in zip(whole, ours, strict=True)), default=math.inf)


def relative_error(a: Tensor, b: Tensor) -> float:
    """The largest |a - b| over 1 + the largest |a|; infinite where shapes differ or something is not a number."""
    error = float((a - b).abs().max() / (1 + a.abs().max())) if a.shape == b.shape else math.inf
    return error if error == error else math.inf


def draw_values(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random values of a plausible scale, so that no zero or equal entry hides a wrong cut."""
    if not tensor.is_floating_point():
        return tensor
    fan = math.sqrt(max(1, tensor[0].numel())) if tensor.ndim > 1 else 1.0
    drawn = torch.randn(tensor.shape, generator=generator).to(tensor) / fan
    return drawn.abs() + 0.5 if name.endswith("var") else drawn


def float_leaves(out: Any) -> list[Tensor]:
    """The floating-point tensors in what a model answered."""
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


class WithoutNormalization(TorchFunctionMode):
    """Leaves out what rightly differs between a cut and a masked model: normalisation over channels, 1 / sqrt(head width).

    softsign of each value stands in for the normalisation, so that deep models stay in the range of floats.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = op_name(func)
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
            return func(*unscale_queries(list(args)), **kwargs)
        return func(*args, **kwargs)


def unscale_queries(args: list[Any]) -> list[Any]:
    """The arguments of multi_head_attention_forward with queries that make up for the 1 / sqrt(width) of a head."""
    size, heads, packed, bias = args[3:7]
    scale = math.sqrt(size / heads)
    if packed is not None:
        factor = torch.cat([torch.full((size,), scale), torch.ones(2 * size)]).to(packed)
        args[5], args[6] = packed * factor[:, None], None if bias is None else bias * factor
    return args
