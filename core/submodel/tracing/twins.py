"""Runs a cut module and the full one with the removed entries zero, so that both compute the same wherever the cut is right.

Some things rightly differ. A number that the code computes of a size (`q.shape[-1] ** 0.5`, the scale of attention) is in a cut
module that of its own size, and a reduction over channels (normalisation, `x.mean(-1)`) is over those that it has: the full module
is given the cut one's numbers and reduces over the same channels. 0 / 0 of removed entries is 0. The 1 / sqrt(width) within
torch.nn.MultiheadAttention is left out of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from hetfl.models.state import State, call_with, named_tensors
from hetfl.submodel.tracing.channels import op_name
from hetfl.submodel.tracing.ops import NUMBERS, REDUCE, SAME, SOFT
from hetfl.submodel.tracing.rules import COMPUTES
from hetfl.submodel.widths import Kept, Widths

NORMS = frozenset("layer_norm rms_norm group_norm".split())  # with parameters for each channel

FULL = (
    SOFT | NORMS | frozenset("normalize batch_norm _weight_norm".split())
)  # reductions whose result has the shape of their operand

RATIOS = frozenset("_weight_norm div divide true_divide __truediv__ __rtruediv__ mul __mul__ __rmul__".split())

ABOUT = frozenset(  # what is asked about a tensor, whatever its values
    "shape size dim ndim numel nelement stride dtype device layout requires_grad is_floating_point is_complex is_contiguous "
    "is_cuda is_sparse is_nested is_quantized is_leaf is_meta element_size __len__ __hash__".split()
)

Value = Callable[[], Tensor]

Cuts = Mapping[int, list[tuple[int, Tensor]]]  # op -> (dim of its first operand, the positions that remain along it)


NOTHING: Mapping[str, Value] = MappingProxyType({})


class OtherOpsError(Exception):
    """The cut module calls other operations than the full one."""


def run_twins(
    widths: Widths, small: nn.Module, model: nn.Module, given: State, inputs: Sequence[Tensor], kept: Kept,
    masked: Mapping[str, Value] = NOTHING, drawn: Mapping[str, Value] = NOTHING,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """The floating-point outputs of `small`, the cut module, and of `model` with the values `given`, both in evaluation mode.

    The values of the tensors of `model` that `masked` names, and of `small` that `drawn` does, are what their functions answer
    whenever they are used. Raises OtherOpsError, and whatever the cut module raises.
    """
    cuts = {op: [(d, axis.index(kept).sort().values) for d, axis in dims] for op, dims in widths.reductions.items()}
    first = Recorder(small, drawn)
    with torch.no_grad(), first:
        ours = float_leaves(small.eval()(*inputs))
    with torch.no_grad(), Replayer(model, masked, first.calls, cuts):
        theirs = float_leaves(call_with(model.eval(), given, *inputs))
    return ours, theirs


def float_leaves(out: Any) -> list[Tensor]:
    """The floating-point tensors in what a model answered."""
    return [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point()]


class StandIn(TorchFunctionMode):
    """Runs every op with what the functions `values` answer in place of the tensors of `model` that they name."""

    def __init__(self, model: nn.Module, values: Mapping[str, Value]) -> None:
        super().__init__()
        own = named_tensors(model)
        self.values = {id(own[name]): value for name, value in values.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = op_name(func)
        if name in ABOUT:
            return func(*args, **(kwargs or {}))
        args, kwargs = self._stand_in(args, kwargs or {})
        return self.compute(name, func, args, kwargs) if name in COMPUTES else func(*args, **kwargs)

    def compute(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """What the op `func`, of this name, answers."""
        raise NotImplementedError

    def _stand_in(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments of an op with what stands for the model's tensors."""
        leaves, form = tree_flatten((args, kwargs))
        if not any(id(x) in self.values for x in leaves):
            return args, kwargs
        found: tuple[Any, Any] = tree_unflatten([self.values[id(x)]() if id(x) in self.values else x for x in leaves], form)
        return found


class Recorder(StandIn):
    """Notes every op that runs, with the numbers that it is given."""

    def __init__(self, model: nn.Module, values: Mapping[str, Value]) -> None:
        super().__init__(model, values)
        self.calls: list[tuple[str, list[Any]]] = []

    def compute(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = set_scale(name, args, kwargs)
        self.calls.append((name, [x if is_number(x) else None for x in tree_leaves((args, kwargs))]))
        return func(*args, **kwargs)


class Replayer(StandIn):
    """Runs the same ops with the numbers of the recorded ones, reductions over channels over those that `cuts` leaves."""

    def __init__(self, model: nn.Module, values: Mapping[str, Value], calls: Sequence[tuple[str, list[Any]]], cuts: Cuts) -> None:
        super().__init__(model, values)
        self.calls, self.cuts, self.done = calls, cuts, 0

    def compute(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = set_scale(name, args, kwargs)
        if self.done >= len(self.calls) or self.calls[self.done][0] != name:
            raise OtherOpsError
        self.done += 1
        if self.done in self.cuts and name not in FULL | REDUCE:
            raise OtherOpsError
        cut, (leaves, form) = self.cuts.get(self.done, []), tree_flatten((args, kwargs))
        numbers = self.calls[self.done - 1][1]
        whole = bool(cut) or name in NUMBERS or (name.removesuffix("_") if not name.startswith("__") else name) in SAME
        given = [
            n if n is not None and is_number(x) and (whole or isinstance(x, float)) else x
            for x, n in zip(leaves, numbers, strict=True)
        ]
        if not cut:
            args, kwargs = tree_unflatten(given, form)
            out = func(*args, **kwargs)
            return out.nan_to_num(0.0, math.inf, -math.inf) if name in RATIOS and isinstance(out, Tensor) else out
        x = next(t for t in given if isinstance(t, Tensor))
        args, kwargs = tree_unflatten(select(given, cut, name in NORMS), form)
        out = func(*args, **kwargs)
        out = out.nan_to_num(0.0, math.inf, -math.inf) if name in RATIOS else out
        return spread(out, x, cut) if name in FULL else out


def is_number(x: Any) -> bool:
    """Whether `x` is an int or a float (True and False are not)."""
    return isinstance(x, int | float) and not isinstance(x, bool)


def set_scale(name: str, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of attention with its scale among them; those of other ops as they are."""
    if name == "scaled_dot_product_attention" and len(args) < 7:
        query = args[0] if args else kwargs["query"]
        scale = kwargs.get("scale")
        kwargs = {**kwargs, "scale": query.shape[-1] ** -0.5 if scale is None else scale}
    elif name == "multi_head_attention_forward":
        args = unscale_queries(list(args))
    return args, kwargs


def unscale_queries(args: list[Any]) -> list[Any]:
    """The arguments of multi_head_attention_forward with queries that make up for the 1 / sqrt(width) of a head."""
    size, heads, packed, bias = args[3:7]
    scale = math.sqrt(size / heads)
    if packed is not None:
        factor = torch.cat([torch.full((size,), scale), torch.ones(2 * size)]).to(packed)
        args[5], args[6] = packed * factor[:, None], None if bias is None else bias * factor
    return args


def select(leaves: Iterable[Any], cut: Sequence[tuple[int, Tensor]], parameters: bool) -> list[Any]:
    """The arguments of an op with the first tensor cut along its dims; with `parameters` the others along their first dim."""
    found, first = [], True
    for x in leaves:
        if isinstance(x, Tensor) and (first or parameters):
            for dim, positions in cut:
                x = x.index_select(dim if first else 0, positions)
            first = False
        found.append(x)
    return found


def spread(out: Tensor, like: Tensor, cut: Sequence[tuple[int, Tensor]]) -> Tensor:
    """`out` in the shape of `like`, with zeros where it was cut."""
    for dim, positions in reversed(cut):
        shape = (*out.shape[:dim], like.shape[dim], *out.shape[dim + 1 :])
        out = out.new_zeros(shape).index_copy(dim, positions, out)
    return out
