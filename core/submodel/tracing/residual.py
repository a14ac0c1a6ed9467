"""Finds the residual blocks of any module and proves them: without one, it must compute what it does with that block gated off."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from hetfl.models.state import State, call_with, named_tensors, tensors
from hetfl.models.watching import run_watched
from hetfl.rng import stream
from hetfl.submodel.depth import skip_blocks
from hetfl.submodel.tracing.twins import float_leaves
from hetfl.submodel.tracing.verify import TOLERANCE, describe_error, draw_values, find_provable, relative_error

MOST_INSIDE = 0.5  # of a block's entries that lie in blocks within it: above that they are the blocks


@dataclass(frozen=True, eq=False)
class Call:
    """A module's only call: what it was given."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def find_blocks(model: nn.Module, x: Tensor) -> tuple[str, ...]:
    """The residual blocks of `model` by name, in order of execution, found by running it on `x`, a batch of two or more.

    A block runs once and answers its first argument, features (N, …), with a tensor of the same shape, and what it adds to it
    depends on it. With its matrices zero, its answer still depends on its argument: there is a path around its layers. (A block is
    so x + f(x), or a norm or an activation of that, but no layer that happens to keep the shape, and no position embedding.) Where
    most of a block's entries lie in smaller ones, these are the blocks. All are proven together (`find_fault`): those whose tensors
    others use too, or that are looked into from outside, are none. The model and torch's random state are left as they were.
    """
    modes, generator = [(m, m.training) for m in model.modules()], stream(0, "blocks")
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = [call for call in record_calls(model, x) if has_way_around(call, generator)]
            outer = [call.name for call in found if not is_made_of(call, found)]
            blocks = [name for name in outer if not any(name.startswith(f"{other}.") for other in outer)]
            return tuple(find_provable(partial(find_fault, model, x), blocks, (), {}))
    finally:
        for module, training in modes:
            module.training = training


def record_calls(model: nn.Module, x: Tensor) -> list[Call]:
    """The modules within `model` that could be blocks by their shapes, in order of execution, with what they were given."""
    given: dict[nn.Module, Call] = {}
    times: dict[nn.Module, int] = {}
    ended: list[nn.Module] = []
    heavy = {module for module in model.modules() if any(t.ndim > 1 for t in own_tensors(module).values())}
    names = {module: name for name, module in model.named_modules() if name and module in heavy}

    def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        times[module] = times.get(module, 0) + 1
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))  # a block may work in place
        given[module] = Call(names[module], module, args, kwargs)

    def end(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        first = given[module].args[0] if given[module].args else None
        if not (isinstance(first, Tensor) and isinstance(out, Tensor) and first.is_floating_point() and first.ndim > 1):
            return
        if len(first) == len(x) and out.shape == first.shape and out.dtype == first.dtype:
            ended.append(module)

    hooks: list[RemovableHandle] = [m.register_forward_pre_hook(start, with_kwargs=True) for m in names]
    run_watched(model, x, [*hooks, *(m.register_forward_hook(end) for m in names)])
    return [given[module] for module in ended if times[module] == 1]


def own_tensors(module: nn.Module) -> State:
    """All tensors of `module` by name, what is frozen of it among them."""
    return {name: t.detach() for name, t in named_tensors(module).items()}


def has_way_around(call: Call, generator: torch.Generator) -> bool:
    """Whether a module's answer depends on its first argument with its matrices zero, and what it adds to that does without."""
    x = call.args[0]
    other = x + torch.randn(x.shape, generator=generator).to(x)
    full = {name: draw_values(name, t, generator) for name, t in own_tensors(call.module).items()}
    bare = {name: torch.zeros_like(t) if t.ndim > 1 else t for name, t in full.items()}

    def answer(state: State, x: Tensor) -> Tensor:
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (call.args[1:], call.kwargs))
        out: Tensor = call_with(call.module.eval(), state, x.clone(), *args, **kwargs)
        return out

    around = relative_error(answer(bare, x), answer(bare, other)) > TOLERANCE
    return around and relative_error(answer(full, x) - x, answer(full, other) - other) > TOLERANCE


def is_made_of(call: Call, others: Sequence[Call]) -> bool:
    """Whether most of a block's entries lie in those of the `others` that are within it."""
    inner = [f"{other.name}." for other in others if other.name.startswith(f"{call.name}.")]
    own = {f"{call.name}.{name}": t.numel() for name, t in own_tensors(call.module).items()}
    inside = sum(number for name, number in own.items() if any(name.startswith(block) for block in inner))
    return inside > MOST_INSIDE * sum(own.values())


def find_fault(model: nn.Module, x: Tensor, blocks: Sequence[str]) -> str | None:
    """What is wrong with leaving `blocks` out: None where the model without all of them, and without some, computes what the whole
    one does with them gated off (to TOLERANCE), and runs in training mode."""
    shared = [t for block in blocks for t in find_shared(model, block)]
    if shared:
        return f"'{shared[0]}' is used outside of it too"
    generator = stream(0, "prove blocks")
    some = [block for block in blocks if torch.rand((), generator=generator) < 0.5]
    for left_out in (blocks, some):
        state = {name: draw_values(name, t, generator) for name, t in tensors(model).items()}
        with gated_off(model, left_out):
            whole = float_leaves(call_with(model.eval(), state, x))
        small = skip_blocks(model, left_out)
        own = {name: state[name].clone() for name in tensors(small)}
        try:
            cut = float_leaves(call_with(small.eval(), own, x))
            error = max(relative_error(a, b) for a, b in zip(whole, cut, strict=True))
            call_with(small.train(), own, x)
        except Exception as failure:
            return f"the model without it does not run ({describe_error(failure)})"
        if error > TOLERANCE:
            return "leaving it out changes more than what it adds"
    return None


def find_shared(model: nn.Module, block: str) -> list[str]:
    """The tensors of module `block` of `model` that are also tensors of modules outside of it."""
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    outside = {id(t) for name, t in own if not name.startswith(f"{block}.")}
    return [name for name, t in own if name.startswith(f"{block}.") and id(t) in outside]


@contextmanager
def gated_off(model: nn.Module, blocks: Sequence[str]) -> Iterator[None]:
    """Within the block of code the named modules of `model` run, but answer what they were given."""
    given: dict[nn.Module, Tensor] = {}

    def start(module: nn.Module, args: tuple[Any, ...]) -> None:
        given[module] = args[0].clone()

    modules = [model.get_submodule(block) for block in blocks]
    hooks: list[RemovableHandle] = [m.register_forward_pre_hook(start) for m in modules]
    hooks += [m.register_forward_hook(lambda m, args, out: given[m]) for m in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
