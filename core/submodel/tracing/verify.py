"""Proof by trial that width groups may be cut: a cut model must compute what the full one does with the removed entries zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hetfl.models.state import tensors
from hetfl.rng import stream
from hetfl.submodel.blocks import take
from hetfl.submodel.slicing import build_submodel
from hetfl.submodel.tracing.twins import OtherOpsError, run_twins
from hetfl.submodel.widths import Kept, Widths, freeze_groups

TOLERANCE = 1e-4  # of the largest difference of outputs, relative to 1 + the largest output


def prove(widths: Widths, model: nn.Module, inputs: Sequence[Tensor]) -> Widths:
    """`widths` without the groups whose cut changes what the model computes, or keeps it from running."""
    faults: dict[str, str] = {}
    find_provable(partial(find_fault, widths, model, inputs), [g.name for g in widths.groups], (), faults)
    return freeze_groups(widths, faults)


def find_provable(
    find_fault: Callable[[Sequence[str]], str | None], names: Sequence[str], proven: Sequence[str], faults: dict[str, str]
) -> Sequence[str]:
    """`proven`, what can be cut together, and as many of `names` as can be cut with them, found by halving.

    What is wrong with the others goes into `faults`.
    """
    fault = find_fault([*proven, *names]) if names else None
    if fault is None:
        return [*proven, *names]
    if len(names) == 1:
        faults[names[0]] = fault
        return proven
    half = len(names) // 2
    proven = find_provable(find_fault, names[:half], proven, faults)
    return find_provable(find_fault, names[half:], proven, faults)


def find_fault(widths: Widths, model: nn.Module, inputs: Sequence[Tensor], groups: Sequence[str]) -> str | None:
    """What is wrong with two random cuts of `groups`: None where both compute what the masked full model does (to TOLERANCE), and
    run in training mode."""
    cut = set(groups)
    for draw in range(2):
        generator = stream(0, "prove", draw)
        kept = {g.name: draw_units(g.size, generator) if g.name in cut else torch.arange(g.size) for g in widths.groups}
        try:
            small, error = compare_cut(widths, model, inputs, kept, generator)
            small.train()(*inputs)
            del small
        except OtherOpsError:
            return "the code takes another path when it is cut"
        except Exception as failure:
            return f"the cut module does not run ({describe_error(failure)})"
        if error > TOLERANCE:
            return "a cut changes the output: the code depends on its size or on the order of its channels"
    return None


def describe_error(error: Exception) -> str:
    """The type of an error and the first line of what it says."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def draw_units(size: int, generator: torch.Generator) -> Tensor:
    """Between 2 (a single one would broadcast) and all but one of `size` units, in random order, shape (number,)."""
    fewest = min(2, size - 1)
    count = int(torch.randint(fewest, max(size, fewest + 1), (1,), generator=generator))
    return torch.randperm(size, generator=generator)[:count]


def compare_cut(
    widths: Widths, model: nn.Module, inputs: Sequence[Tensor], kept: Kept, generator: torch.Generator
) -> tuple[nn.Module, float]:
    """(the model cut to `kept`, the largest difference of its outputs from those of the full one with the other entries zero).

    The weights of both are random, those that are cut or hollow drawn when they are used; the difference is relative to 1 + the
    largest output, infinite where shapes differ or something is not a number. What rightly differs is made equal (`twins`).
    """
    index, own = widths.index(kept), tensors(model)
    seeds = dict(zip(own, torch.randint(1 << 62, (len(own),), generator=generator).tolist(), strict=True))

    def draw(name: str) -> Tensor:
        return draw_values(name, own[name], torch.Generator().manual_seed(seeds[name]))

    def mask(name: str) -> Tensor:
        return clear_rest(draw(name), index.get(name, {}))

    def cut(name: str) -> Tensor:
        return take(draw(name), index.get(name, {}))

    hollow = {name for name, tensor in own.items() if is_hollow(tensor)}
    small = build_submodel(widths, model, kept, {name: cut_hollow(own[name], index.get(name, {})) for name in hollow})
    with torch.no_grad():
        for name, tensor in tensors(small).items():
            if name not in hollow:
                tensor.copy_(cut(name))
    smaller = {name for name in own if any(len(at) < own[name].shape[dim] for dim, at in index.get(name, {}).items())}
    given = {name: draw(name) for name in own if name not in hollow | smaller}
    masked = {name: partial(mask, name) for name in hollow | smaller}
    outputs = run_twins(widths, small, model, given, inputs, kept, masked, {name: partial(cut, name) for name in hollow})
    return small, max((relative_error(a, b) for a, b in zip(*reversed(outputs), strict=True)), default=math.inf)


def is_hollow(tensor: Tensor) -> bool:
    """Whether all entries of `tensor` lie in one place of memory (`empty_frozen`)."""
    return tensor.numel() > 1 and not any(step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def cut_hollow(tensor: Tensor, index: Mapping[int, Tensor]) -> nn.Parameter:
    """The block of a hollow tensor at `index`, as hollow."""
    shape = [len(index[dim]) if dim in index else size for dim, size in enumerate(tensor.shape)]
    return nn.Parameter(tensor.new_zeros(1).expand(shape), requires_grad=False)


def relative_error(a: Tensor, b: Tensor) -> float:
    """The largest |a - b| over 1 + the largest |a|; infinite where shapes differ or something is not a number."""
    error = float((a - b).abs().max() / (1 + a.abs().max())) if a.shape == b.shape else math.inf
    return error if error == error else math.inf


def draw_values(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Random values of a plausible scale, so that no zero or equal entry hides a wrong cut."""
    if not tensor.is_floating_point():
        return tensor.clone()
    fan = math.sqrt(max(1, tensor[0].numel())) if tensor.ndim > 1 else 1.0
    drawn = torch.randn(tensor.shape, generator=generator).to(tensor).div_(fan)
    return drawn.abs_().add_(0.5) if name.endswith("var") else drawn


def clear_rest(tensor: Tensor, index: Mapping[int, Tensor]) -> Tensor:
    """`tensor` with zeros outside the block at `index`, in place."""
    for dim, where in index.items():
        rest = torch.ones(tensor.shape[dim], dtype=torch.bool).index_fill_(0, where, False)
        tensor.index_fill_(dim, rest.nonzero().flatten(), 0)
    return tensor
