"""What is computed of parameters alone: weights that are standardised, transposed, masked or of low rank before they are used.

Such a tensor has channels along several dims, an activation along one. It travels with its factors: for each dim of channels the
ids of its elements (`ChannelTable.factors_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from hetfl.submodel.tracing.channels import narrow_constant_dims, read_along, varying_dims
from hetfl.submodel.tracing.layers import name_arguments, read_argument
from hetfl.submodel.tracing.moves import run_move
from hetfl.submodel.tracing.ops import MOVES, ORDERED, REDUCE, SAME, SOFT, SPATIAL
from hetfl.submodel.tracing.table import ChannelTable, Factors


def trace_weight(table: ChannelTable, name: str, out: Any, args: Any, kwargs: Any) -> None:
    """Traces an op of parameters alone, and constants; an unknown one loses the channels."""
    base = name if name.startswith("__") else name.removesuffix("_")
    if base in MOVES:
        move_factors(table, base, out, args, kwargs)
    elif base in SAME:
        operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        table.assign_factors(out, join_factors(table, operands, out.ndim))
    elif base in REDUCE and base not in ORDERED:
        reduce_factors(table, base in SOFT, out, args[0], reduced_dims(args, kwargs, args[0].ndim))
    elif base in SPATIAL:
        found = [ids for f in table.factors_of(args[0]) or () if (ids := narrow_constant_dims(f)).shape[2:].numel() == 1]
        table.assign_factors(out, tuple(found))
    elif base in OTHERS:
        OTHERS[base](table, out, args, kwargs)
    else:
        for leaf in tree_leaves(out):
            table.assign_factors(leaf, (), name)


def move_factors(table: ChannelTable, name: str, out: Any, args: Any, kwargs: Any) -> None:
    """Runs an op that only moves data on each factor; of several operands (cat, stack) on the factors along the same dims."""
    if isinstance(args[0], Tensor):
        found = [run_move(name, ids.contiguous(), args, kwargs) for ids in table.factors_of(args[0]) or ()]
    else:
        each = [{tuple(varying_dims(f)): f for f in table.factors_of(x) or ()} for x in args[0]]
        absent = [torch.full((1,) * x.ndim, -1).expand(x.shape) for x in args[0]]
        found = [
            run_move(name, [f.get(dims, none) for f, none in zip(each, absent, strict=True)], args, kwargs)
            for dims in dict.fromkeys(dims for f in each for dims in f)
        ]
    for i, leaf in enumerate(tree_leaves(out)):
        table.assign_factors(leaf, tuple(pieces[i] for pieces in found))


def join_factors(table: ChannelTable, operands: Sequence[Tensor], ndim: int) -> Factors:
    """The factors of an elementwise result of `ndim` dims: those of all operands, tied where they lie along the same dims."""
    joined: dict[tuple[int, ...], Tensor] = {}
    wide = [x.reshape((1,) * (ndim - x.ndim) + tuple(x.shape)).shape for x in operands]
    for x, shape in zip(operands, wide, strict=True):
        for ids in (f.reshape(shape) for f in table.factors_of(x) or ()):
            dims = tuple(varying_dims(ids))
            if dims in joined:
                joined[dims] = table.combine(joined[dims], ids)
            else:
                joined[dims] = ids
    for x in operands:
        own = {tuple(d + ndim - f.ndim for d in varying_dims(f)) for f in table.factors_of(x) or ()}
        for dims, ids in joined.items():
            full = all(d >= ndim - x.ndim and x.shape[d - ndim] > 1 and x.stride(d - ndim) for d in dims)  # a stride of 0 repeats
            if dims not in own and full:
                table.freeze(ids, f"joins channels that cannot be cut{table.location}")
    return tuple(joined.values())


def reduced_dims(args: Any, kwargs: Any, ndim: int) -> list[int]:
    """The dims that a reduction was given: the first int, tuple or list after its operand, or `dim`; all where there is none."""
    dims = kwargs.get("dim", next((a for a in args[1:] if isinstance(a, int | tuple | list) and not isinstance(a, bool)), None))
    return [d % ndim for d in (range(ndim) if dims is None or dims == () else [dims] if isinstance(dims, int) else dims)]


def reduce_factors(table: ChannelTable, soft: bool, out: Any, x: Tensor, over: Sequence[int]) -> None:
    """A reduction of `x` over some dims, in the shape of `x` where it is `soft`: the channels along the other dims stay."""
    factors = table.factors_of(x) or ()
    gone = [(d, line) for d in over for f in factors if (line := read_along(f, d)) is not None]
    table.note_reduction(gone)
    for leaf in tree_leaves(out):
        left = factors if soft else [f for f in factors if not set(varying_dims(f)) & set(over)]
        if not soft and leaf.ndim < x.ndim:
            for d in sorted(over, reverse=True):
                left = [f.select(d, 0) for f in left]
        elif not soft:
            for d in over:
                left = [f.narrow(d, 0, 1) for f in left]
        table.assign_factors(leaf, tuple(left))


def standardize_rows(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    """batch_norm of a weight as a batch of (1, rows, entries)."""
    x, mean, var, weight, bias = name_arguments("input", "running_mean", "running_var", "weight", "bias")(args, kwargs)
    for parameter in (mean, var, weight, bias):
        for line in (f for f in table.factors_of(x) or () if varying_dims(f) == [1]):
            table.own(parameter, 0, read_along(line, 1)) if parameter is not None else None  # type: ignore[arg-type]
    reduce_factors(table, True, out, x, [d for d in range(x.ndim) if d != 1])


def normalize_rows(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    """F.normalize: over one dim."""
    reduce_factors(table, True, out, args[0], [read_argument(args, kwargs, 2, "dim", 1) % args[0].ndim])


def norm_weight(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    """torch._weight_norm(v, g, dim): g * v / |v|, the norm over all dims but `dim`."""
    v, g, dim = args[0], args[1], read_argument(args, kwargs, 2, "dim", 0)
    reduce_factors(table, True, out, v, [d for d in range(v.ndim) if dim in (None, -1) or d != dim])
    table.assign_factors(out, join_factors(table, [v, g], out.ndim))


def multiply_weights(table: ChannelTable, out: Tensor, args: Any, kwargs: Any) -> None:
    """A product of matrices or vectors: the inner channels are tied, the outer ones stay."""
    a, b = args[0], read_argument(args, kwargs, 1, "other")
    left, right = table.factors_of(a) or (), table.factors_of(b) or ()
    inner, outer = a.ndim - 1, max(b.ndim - 2, 0)
    lines = [[f for f in factors if dim in varying_dims(f)] for factors, dim in ((left, inner), (right, outer))]
    for one, other in ((f, g) for f in lines[0] for g in lines[1]):
        table.tie(table.along(one, inner, a.shape[-1]), table.along(other, outer, b.shape[outer]))
    if not all(lines):
        for f in (*lines[0], *lines[1]):
            table.freeze(f, f"joins channels that cannot be cut{table.location}")
    keep = [f.select(inner, 0) for f in left if inner not in varying_dims(f)]
    rest = [f.select(outer, 0) for f in right if outer not in varying_dims(f)]
    rows = [f.unsqueeze(-1) for f in keep] if b.ndim > 1 else keep
    columns = [f.unsqueeze(-2) for f in rest] if a.ndim > 1 and b.ndim > 1 else rest
    table.assign_factors(out, (*rows, *columns))


OTHERS: dict[str, Callable[[ChannelTable, Any, Any, Any], None]] = {
    "batch_norm": standardize_rows,
    "normalize": normalize_rows,
    "_weight_norm": norm_weight,
    **dict.fromkeys("matmul __matmul__ mm mv bmm dot vdot".split(), multiply_weights),
}
