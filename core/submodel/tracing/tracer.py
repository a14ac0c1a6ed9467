"""Which channels of a module go together, found by running it once (docs/design.md, "Width groups").

Beside each activation travels a LongTensor of its shape with the channel id of every element (-1: none). Ops that only move data
run on the ids themselves; elementwise ops tie the ids of their operands; rules exist for the ops that own or mix parameters. The
channels that any other op touches are frozen: they are not cut. That this is right of a given model is not taken for granted:
`groups.trace` proves every group by two random cuts (relative error at most 1e-4) and freezes those that fail.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from hetfl.submodel.tracing.channels import op_name, place_along, read_along, varies
from hetfl.submodel.tracing.moves import follow_slices, run_move
from hetfl.submodel.tracing.ops import CASTS, DRAWS, MADE, MOVES, NEW, ORDERED, REDUCE, SAME, SHAPED, SOFT, SPATIAL, VALUES
from hetfl.submodel.tracing.rules import COMPUTES, RULES
from hetfl.submodel.tracing.sizes import TracedInt, unwrap_ints, wrap_ints
from hetfl.submodel.tracing.table import ChannelTable, Heads
from hetfl.submodel.tracing.weights import OTHERS, reduced_dims, trace_weight


class Tracer(TorchFunctionMode):
    """Fills a ChannelTable while forward passes run, one op after another."""

    def __init__(self, model: nn.Module, heads: Heads = "width") -> None:
        super().__init__()
        self.table = ChannelTable(model, heads)
        self.reached: set[int] = set()  # ids of the parameters that some op used
        self.branches: list[str] = []  # names of the modules that turned a tensor into a Python value

    def run(self, model: nn.Module, *inputs: Tensor) -> None:
        """Traces `model(*inputs)`; the channels of its outputs are frozen, for they are what the caller reads."""
        table, names, thread = self.table, {id(m): name for name, m in model.named_modules()}, threading.get_ident()

        def enter(module: nn.Module, _: Any) -> None:
            if threading.get_ident() == thread:  # the hooks are the process's: other threads may run other models
                table.stack.append(names.get(id(module), "?"))

        def leave(*_: Any) -> None:
            if threading.get_ident() == thread:
                table.stack.pop()

        table.op = None if model.training else 0
        before = hooks.register_module_forward_pre_hook(enter)
        after = hooks.register_module_forward_hook(leave, always_call=True)
        wrapped = wrap_ints(table.claims, model)
        try:
            with self:
                out = model(*inputs)
        finally:
            unwrap_ints(wrapped)
            table.op = None
            before.remove()
            after.remove()
            table.stack.clear()
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                table.freeze(table.ids_of(leaf), "the model's output")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = op_name(func)
        if self.table.op is not None and name in COMPUTES:
            self.table.op += 1
        if name in ("shape", "size"):
            return self._trace_size(out, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self._note(name, tensors)
        if name == "__setitem__":
            self._freeze_written(args)
        if name in MADE and isinstance(out, Tensor):
            self._trace_made(out, args[1:] if args and isinstance(args[0], Tensor) else args)
        if name not in NEW and any(isinstance(t, Tensor) for t in tree_leaves(out)):
            self._trace(name, out, args, kwargs, tensors)
        return out

    def _note(self, name: str, tensors: list[Tensor]) -> None:
        """Notes which parameters an op uses, whether it draws random numbers, and where it turns a tensor into a Python value."""
        self.table.draws |= name in DRAWS
        self.reached.update(id(t) for t in tensors if id(t) in self.table.parameters)
        if name in VALUES:
            self.branches.append(self.table.stack[-1] if self.table.stack else "")

    def _trace(self, name: str, out: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        """Traces an op that answers with tensors: by its own rule, as one of parameters alone, or by its kind."""
        if name == "unfold" and out.ndim > args[0].ndim:  # Tensor.unfold, which only moves data; not nn.functional.unfold
            self._trace_move(name, out, args, kwargs)
        elif name in RULES and not (name in OTHERS and self._are_weights(tensors)):
            RULES[name](self.table, out, args, kwargs)
        elif self._are_weights(tensors):
            trace_weight(self.table, name, out, args, kwargs)
            if name in SHAPED:
                for factor in self.table.factors_of(out) or ():
                    self._bind_sizes(name, args, kwargs, [factor])
        elif any(self.table.ids_of(t) is not None for t in tensors):
            self._trace_plain(name, out, args, kwargs, tensors)

    def _are_weights(self, tensors: list[Tensor]) -> bool:
        """Whether an op's operands are parameters, or computed of them alone, and constants."""
        return any(map(self.table.is_raw, tensors)) and not any(hasattr(t, "_channel_ids") for t in tensors)

    # sizes

    def _trace_size(self, out: Any, args: Any, kwargs: Any) -> Any:
        """What `x.shape` or `x.size(dim)` answers, the numbers of channels as TracedInts."""
        sizes = self.table.trace_shape(args[0])
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        return sizes[dim] if isinstance(out, int) else torch.Size(sizes)

    def _trace_made(self, out: Tensor, args: Any) -> None:
        """A new tensor whose size is a number of channels is made of as many (the first state of a recurrent net)."""
        sizes = [s for a in args for s in (a if isinstance(a, tuple | list) else [a])][: out.ndim]
        for dim, size in reversed(list(enumerate(sizes))):
            if isinstance(size, TracedInt) and size.share == 1 and size == out.shape[dim]:
                ids = self.table.allocate(int(size)) if size.ids is None else size.ids
                self.table.claim(size, ids)
                self.table.assign(out, place_along(ids, out.ndim, dim))
                return

    def _bind_sizes(self, name: str, args: Any, kwargs: Any, pieces: list[Tensor]) -> None:
        """Makes the sizes that a reshape or split was given follow the channels that they count in `pieces`, the ids it gave."""
        given, dim = [*args[1:], *(v for k, v in kwargs.items() if k != "dim")], 0
        if name in ("unflatten", "split"):
            dim = kwargs.get("dim", given.pop(0 if name == "unflatten" else 1) if len(given) > 1 else 0) % args[0].ndim
        flat = [s for g in given for s in (g if isinstance(g, tuple | list) else [g])]
        for i, size in enumerate(flat):
            piece = pieces[min(i, len(pieces) - 1)] if name == "split" else pieces[0]
            at = dim if name == "split" else dim + i
            if isinstance(size, TracedInt) and size.claims is self.table.claims and at < piece.ndim:
                line = read_along(self.table.find(piece), at)
                if line is not None or not self.table.is_raw(args[0]):
                    self.table.bind(size, line)

    # ops that own no parameters

    def _freeze_written(self, args: Any) -> None:
        """Channels that are written into a tensor by position (`x[i] = y`) cannot be cut."""
        for tensor in (args[0], args[2]):
            ids = self.table.ids_of(tensor) if isinstance(tensor, Tensor) else None
            self.table.freeze(ids, f"written by position{self.table.location}")

    def _trace_plain(self, name: str, out: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        """Traces an op without a rule by its kind: it moves, combines or reduces; the channels that others touch are frozen."""
        table, base = self.table, name.removesuffix("_") if not name.startswith("__") else name
        if base in MOVES:
            self._trace_move(base, out, args, kwargs)
        elif base in SAME:
            table.assign(out, self._combine_all(out, tensors[:1] if base in CASTS else tensors))
        elif base in REDUCE:
            self._trace_reduction(base, out, args, kwargs)
        elif base in SPATIAL:
            ids = table.along(table.ids_of(args[0]), 1, args[0].shape[1])
            for leaf in tree_leaves(out):
                table.assign(leaf, place_along(ids, leaf.ndim, 1))
        else:
            for tensor in tensors:
                table.freeze(table.ids_of(tensor), f"unknown operation {name}{table.location}")

    def _combine_all(self, out: Tensor, tensors: Iterable[Tensor]) -> Tensor | None:
        """The ids of an elementwise op's result from those of its operands, activations first."""
        combined: Tensor | None = None
        for tensor in sorted(tensors, key=self.table.is_raw):
            raw = self.table.is_raw(tensor)
            ids = self.table.ids_of(tensor, combined if raw else None)
            ids = torch.full((1,) * tensor.ndim, -1).expand(tensor.shape) if ids is None else ids
            ids = self.table.find(ids)
            combined = ids if combined is None else self.table.combine(combined, ids)
        return None if combined is None else combined.expand(torch.broadcast_shapes(combined.shape, out.shape))

    def _trace_move(self, name: str, out: Any, args: Any, kwargs: Any) -> None:
        """Runs an op that only moves data on the ids themselves."""
        table, single = self.table, isinstance(args[0], Tensor)
        varying = None if single else next((ids for t in args[0] if (ids := getattr(t, "_channel_ids", None)) is not None), None)
        source = tree_map(lambda x: self._replace_by_ids(x, varying), args[0])
        pieces = run_move(name, source, args, kwargs)
        if single:
            given = next((a for a in (*args[1:], *kwargs.values()) if isinstance(a, tuple | list)), None)
            if name != "__getitem__" or not follow_slices(table, source, args[1]):
                self._tie_pieces(name, source, pieces, given)
        heads = table.heads == "whole" and single and read_along(table.find(source), source.ndim - 1) is not None
        for leaf, ids in zip(tree_leaves(out), pieces, strict=True):
            table.assign(leaf, table.make_rectangular(ids, heads, 1 if name == "pixel_shuffle" else None))
        if name in SHAPED:
            self._bind_sizes(name, args, kwargs, pieces)

    def _replace_by_ids(self, value: Any, beside: Tensor | None) -> Any:
        """The ids in place of a tensor, -1 where it has none, of parameters along the dims of `beside`; anything else as it is."""
        if not isinstance(value, Tensor):
            return value
        ids = self.table.ids_of(value, beside if self.table.is_raw(value) else None)
        if ids is None:
            return torch.full(value.shape, -1) if value.is_floating_point() else value
        return ids.contiguous()

    def _tie_pieces(self, name: str, source: Tensor, pieces: list[Tensor], given: Any = None) -> None:
        """Pieces of equal size are cut alike; an op that takes some channels of `source` and leaves others freezes them all."""
        if len(pieces) > 1 and len({p.shape for p in pieces}) == 1:
            for piece in pieces[1:]:
                self.table.tie(pieces[0], piece)
        elif name == "split" and given is not None and any(isinstance(s, TracedInt) for s in given):
            for piece in (p for s, p in zip(given, pieces, strict=True) if not isinstance(s, TracedInt)):
                self.table.freeze(piece, f"a part of fixed size (split){self.table.location}")
        elif pieces[0].numel() == source.numel() and name not in ("__getitem__", "index_select"):
            return  # everything is still there
        elif any(len(self.table.find(p).unique()) != len(self.table.find(source).unique()) for p in pieces):
            self.table.freeze(source, f"a part is taken by position ({name}){self.table.location}")

    def _trace_reduction(self, name: str, out: Any, args: Any, kwargs: Any) -> None:
        """A reduction over channels is one over those that remain; one over other dims leaves the channels as they are."""
        table = self.table
        ids = table.ids_of(args[0])
        if ids is None or (len(args) > 1 and isinstance(args[1], Tensor)):  # max(a, b) is elementwise
            first = tree_leaves(out)[0]
            table.assign(first, self._combine_all(first, [t for t in args[:2] if isinstance(t, Tensor)]))
            return
        over, roots = reduced_dims(args, kwargs, ids.ndim), table.find(ids)
        varying = [d for d in over if varies(roots, d)]
        lines = [(d, line) for d in varying if (line := read_along(roots, d)) is not None]
        if varying and (name in ORDERED or not lines):
            table.freeze(roots, f"{name} over channels{table.location}")
            return
        table.note_reduction(lines)
        if name in SOFT:
            table.assign(out, ids)
        elif not varying:
            for leaf in tree_leaves(out):
                left = roots
                for d in sorted(over, reverse=True):
                    left = left.narrow(d, 0, 1) if leaf.ndim == roots.ndim else left.select(d, 0)
                if leaf.is_floating_point():
                    table.assign(leaf, left)
