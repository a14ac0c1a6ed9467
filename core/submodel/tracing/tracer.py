"""Which channels of a module go together, found by running it once (architecture, "width groups of any module").

Beside each activation travels a LongTensor of its shape that names the *unit* every element belongs to (-1: none). Ops that
only move data run on the labels themselves; elementwise ops tie the labels of their operands; rules exist for the ops that own
or mix parameters. What anything else touches is frozen: never wrong, only less elastic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from hetfl.submodel.tracing.channels import apart, channelwise, compact, line_of, name_of, spans, thin, varies
from hetfl.submodel.tracing.ops import DRAWS, MADE, MOVES, NEW, REDUCE, SAME, SHAPED, SOFT, SPATIAL, VALUES
from hetfl.submodel.tracing.rules import RULES
from hetfl.submodel.tracing.sizes import Place, TracedInt, unwrap_ints, wrap_ints

Heads = Literal["width", "whole"]

RAW_LIMIT = 1 << 20


class Tracer(TorchFunctionMode):
    """Labels while forward passes run; `axes`, `claims` and `frozen` hold what was learned.

    `heads` says what is cut where channels are split into attention heads: the width of every head, or whole heads.
    """

    def __init__(self, model: nn.Module, heads: Heads = "width") -> None:
        super().__init__()
        self.heads = heads
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.names: dict[int, str] = {}
        for name, tensor in tensors:
            self.names.setdefault(id(tensor), name)
        kept = model.state_dict(keep_vars=True)
        self.parameters = {id(t) for t in kept.values() if t.is_floating_point()}  # and buffers that travel
        self.where = {id(m): name for name, m in model.named_modules()}
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.raw: dict[str, Tensor] = {}
        self.frozen: list[tuple[Tensor, str]] = []
        self.claims: list[tuple[Place, Tensor, Fraction]] = []  # attributes that must follow the units they count
        self.draws = False
        self.reached: set[int] = set()  # parameters that some op used
        self.branches: list[str] = []  # modules that turned a tensor into a Python value
        self._parent = torch.empty(0, dtype=torch.long)
        self._stack: list[str] = []

    def run(self, model: nn.Module, *inputs: Tensor) -> None:
        """Trace `model(*inputs)`; its outputs' units are frozen, for they are what the caller reads."""
        before = hooks.register_module_forward_pre_hook(lambda m, _: self._stack.append(self.where.get(id(m), "?")))
        after = hooks.register_module_forward_hook(lambda m, _, __: void(self._stack.pop()), always_call=True)
        marked = wrap_ints(self, model)
        try:
            with self:
                out = model(*inputs)
        finally:
            unwrap_ints(marked)
            before.remove()
            after.remove()
            self._stack.clear()
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.freeze(self.labels(leaf), "the model's output")

    # units: a union-find whose parents are one tensor, so that whole label tensors are looked up at once

    def fresh(self, count: int) -> Tensor:
        start = len(self._parent)
        self._parent = torch.cat([self._parent, torch.arange(start, start + count)])
        return torch.arange(start, start + count)

    def root(self, labels: Tensor) -> Tensor:
        """Representatives of `labels` (same shape; -1 stays)."""
        slim = compact(labels)
        known = slim >= 0
        roots = slim.clamp(min=0)
        while len(self._parent) and not torch.equal(up := self._parent[roots], roots):
            roots = up
        return torch.where(known, roots, slim).expand(labels.shape)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Units at equal places go together; a unit that faces none is frozen."""
        ones, others = (x.reshape(-1) for x in torch.broadcast_tensors(compact(a), compact(b)))
        base = len(self._parent) + 1
        pairs = ((ones + 1) * base + others + 1)[ones != others].unique()
        for x, y in zip((pairs // base - 1).tolist(), (pairs % base - 1).tolist(), strict=True):
            if x >= 0 and y >= 0:
                x, y = self._find(x), self._find(y)
                self._parent[max(x, y)] = min(x, y)
            elif max(x, y) >= 0:
                self.freeze(torch.tensor([max(x, y)]), f"joins channels that cannot be cut{self.at()}")

    def _find(self, unit: int) -> int:
        while (up := int(self._parent[unit])) != unit:
            unit = up
        return unit

    def freeze(self, labels: Tensor | None, reason: str) -> None:
        if labels is not None:
            self.frozen.append((compact(labels).unique(), reason))

    def claim(self, attribute: Any, units: Tensor, module: bool = False) -> None:
        """`attribute`, a Size that was read from a module (or, with `module`, the name in the module at work), counts `units`."""
        if isinstance(attribute, TracedInt) and attribute.place is not None:
            self.claims.append((attribute.place, units, attribute.share))
        elif module and self._stack and self._stack[-1] != "?":
            self.claims.append(((self._stack[-1], attribute), units, Fraction(1)))

    def at(self) -> str:
        return f" in {self._stack[-1]}" if self._stack and self._stack[-1] else ""

    # labels of activations and raw parameters

    def labels(self, tensor: Any) -> Tensor | None:
        if id(tensor) in self.parameters and 1 < tensor.numel() <= RAW_LIMIT:
            name = self.names[id(tensor)]
            if name not in self.raw:
                self.raw[name] = self.fresh(tensor.numel()).reshape(tensor.shape)
            return self.raw[name]
        return getattr(tensor, "_units", None)

    def label(self, tensor: Any, labels: Tensor | None, raw: bool = False) -> None:
        if labels is not None and isinstance(tensor, Tensor) and bool((compact(labels) >= 0).any()):
            tensor._units, tensor._raw = thin(labels).expand(tensor.shape), raw  # type: ignore[attr-defined]

    def along(self, labels: Tensor | None, dim: int, size: int) -> Tensor:
        """The units along one dim, shape (size,); where they also vary along another dim, all are frozen."""
        if labels is None:
            return torch.full((size,), -1)
        line = self.root(labels).movedim(dim, 0)
        slim = compact(line).reshape(compact(line).shape[0], -1)
        if bool((slim != slim[:, :1]).any()):
            self.freeze(slim, f"channels are mixed with other dimensions{self.at()}")
            return torch.full((size,), -1)
        return slim[:, 0].expand(size).contiguous()

    def own(self, tensor: Tensor | None, dim: int, units: Tensor) -> None:
        """Dim `dim` of a parameter or buffer consists of `units`."""
        if tensor is None:
            return
        name = self.names.get(id(tensor))
        if name is None and tensor.ndim == 1 and getattr(tensor, "_raw", False):
            self.tie(tensor._units, units)  # type: ignore[attr-defined]
        elif name is None:
            self.freeze(units, f"a weight that is computed, not stored{self.at()}")
            self.freeze(getattr(tensor, "_units", None), f"a weight that is computed, not stored{self.at()}")
        elif (name, dim) in self.axes:
            self.tie(self.axes[name, dim], units)
        else:
            self.axes[name, dim] = units

    def settle(self, labels: Tensor, heads: bool = False, prefer: int | None = None) -> Tensor:
        """A cut must stay rectangular: where units vary along several dims, they are tied along all but one.

        That one is the last of those with the most units (within a factor of 4), the head width where heads are split; with
        `heads`, the one before the last.
        """
        roots = self.root(labels)
        varying = [d for d in range(roots.ndim) if varies(roots, d)]
        if len(varying) > 1:
            counts = {d: len(roots.movedim(d, 0).reshape(roots.shape[d], -1)[:, 0].unique()) for d in varying}
            main = max(d for d in varying if 4 * counts[d] >= max(counts.values()))
            main = varying[-2] if heads else prefer if prefer in varying else main
            for dim in varying:
                if dim != main:
                    self.tie(roots.narrow(dim, 0, 1), roots)
        return labels

    # sizes

    def sized(self, tensor: Any, out: Any, args: Any, kwargs: Any) -> Any:
        """The shape of `tensor`, in which the sizes of dims of channels know their units."""
        labels = getattr(tensor, "_units", None)
        if labels is None:
            return out
        roots = self.root(labels)
        sizes = list(tensor.shape)
        for dim in range(roots.ndim):
            if (line := line_of(roots, dim)) is not None:
                sizes[dim] = TracedInt.of(self, sizes[dim], line)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
        return sizes[dim] if isinstance(out, int) else torch.Size(sizes)

    def shaped(self, name: str, args: Any, kwargs: Any, pieces: list[Tensor]) -> None:
        """Makes the sizes that a reshape or split was given follow what they count."""
        given, dim = [*args[1:], *(v for k, v in kwargs.items() if k != "dim")], 0
        if name in ("unflatten", "split"):
            dim = kwargs.get("dim", given.pop(0 if name == "unflatten" else 1) if len(given) > 1 else 0) % args[0].ndim
        flat = [s for g in given for s in (g if isinstance(g, tuple | list) else [g])]
        for i, size in enumerate(flat):
            piece = pieces[min(i, len(pieces) - 1)] if name == "split" else pieces[0]
            place = dim if name == "split" else dim + i
            if isinstance(size, TracedInt) and size.tracer is self and place < piece.ndim:
                self.bind(size, line_of(self.root(piece), place))

    def made(self, out: Tensor, args: Any) -> None:
        """A new tensor whose size is a number of channels is made of as many (the first state of a recurrent net)."""
        sizes = [s for a in args for s in (a if isinstance(a, tuple | list) else [a])][: out.ndim]
        for dim, size in reversed(list(enumerate(sizes))):
            if isinstance(size, TracedInt) and size.share == 1 and size == out.shape[dim]:
                units = self.fresh(int(size)) if size.line is None else size.line
                self.claim(size, units)
                self.label(out, channelwise(units, out.ndim, dim))
                return

    def bind(self, size: TracedInt, line: Tensor | None) -> None:
        """`size` counts the units `line` (None: something that is never cut)."""
        if size.line is None:
            if line is not None:
                self.claim(size, line)
        elif line is None:
            self.freeze(size.line, f"their number shapes something else{self.at()}")
        else:
            small, big = sorted((size.line, line), key=len)
            self.tie(small[None], big.reshape(-1, len(small)))

    # one op

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = name_of(func)
        self.draws |= name in DRAWS
        rule = RULES.get(name)
        if name in ("shape", "size"):
            return self.sized(args[0], out, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.reached.update(id(t) for t in tensors if id(t) in self.parameters)
        if name in VALUES:
            self.branches.append(self._stack[-1] if self._stack else "")
        if name == "__setitem__":
            self.written(args)
        if name in MADE and isinstance(out, Tensor):
            self.made(out, args[1:] if args and isinstance(args[0], Tensor) else args)
        if name in NEW or not any(isinstance(t, Tensor) for t in tree_leaves(out)):
            return out
        if rule is not None:
            rule(self, out, args, kwargs)
        elif any(self.labels(t) is not None for t in tensors):
            self.plain(name, out, args, kwargs, tensors)
        return out

    def written(self, args: Any) -> None:
        """Channels that are written into a tensor by position stay as they are."""
        for tensor in (args[0], args[2]):
            self.freeze(self.labels(tensor) if isinstance(tensor, Tensor) else None, f"written by position{self.at()}")

    def plain(self, name: str, out: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        """Ops that own no parameters."""
        base = name.removesuffix("_") if not name.startswith("__") else name
        if base in MOVES:
            self.move(base, out, args, kwargs)
        elif base in SAME:
            raw = all(id(t) in self.parameters or getattr(t, "_raw", False) for t in tensors if self.labels(t) is not None)
            self.label(out, self.same(out, tensors), raw)
        elif base in REDUCE:
            self.reduce(base, out, args, kwargs)
        elif base in SPATIAL:
            units = self.along(self.labels(args[0]), 1, args[0].shape[1])
            for leaf in tree_leaves(out):
                self.label(leaf, channelwise(units, leaf.ndim, 1))
        else:
            for tensor in tensors:
                self.freeze(self.labels(tensor), f"unknown operation {name}{self.at()}")

    def move(self, name: str, out: Any, args: Any, kwargs: Any) -> None:
        """Runs an op that only moves data on the labels themselves."""
        single = isinstance(args[0], Tensor)
        raws = [id(t) in self.parameters or getattr(t, "_raw", False) for t in tree_leaves(args[0]) if self.labels(t) is not None]
        raw = bool(raws) and all(raws)
        source = tree_map(self._swapped, args[0])
        name = {"view": "reshape"}.get(name, name)
        moved = moving(name, single)(source, *([args[1].shape] if name.endswith("_as") else args[1:]), **kwargs)
        pieces = list(moved) if isinstance(moved, tuple | list) else [moved]
        if single:
            given = next((a for a in (*args[1:], *kwargs.values()) if isinstance(a, tuple | list)), None)
            self._whole(name, source, pieces, given)
        heads = self.heads == "whole" and single and line_of(self.root(source), source.ndim - 1) is not None
        for leaf, labels in zip(tree_leaves(out), pieces, strict=True):
            self.label(leaf, labels if raw else self.settle(labels, heads, 1 if name == "pixel_shuffle" else None), raw)
        if name in SHAPED and not raw:
            self.shaped(name, args, kwargs, pieces)

    def _swapped(self, value: Any) -> Any:
        """The labels in place of an activation; anything else stays."""
        if not isinstance(value, Tensor):
            return value
        labels = self.labels(value)
        if labels is None:
            return torch.full(value.shape, -1) if value.is_floating_point() else value
        return labels.contiguous()

    def _whole(self, name: str, source: Tensor, pieces: list[Tensor], given: Any = None) -> None:
        """Pieces of equal size are cut alike; what takes some units and leaves others fixes them all."""
        if len(pieces) > 1 and len({p.shape for p in pieces}) == 1:
            for piece in pieces[1:]:
                self.tie(pieces[0], piece)
        elif name == "split" and given is not None and all(isinstance(s, TracedInt) and s.place for s in given):
            return  # every section follows an attribute
        elif pieces[0].numel() == source.numel() and name not in ("__getitem__", "index_select"):
            return  # everything is still there
        elif any(len(self.root(p).unique()) != len(self.root(source).unique()) for p in pieces):
            self.freeze(source, f"a part is taken by position ({name}){self.at()}")

    def same(self, out: Tensor, tensors: Iterable[Tensor]) -> Tensor | None:
        """Ties operands of one shape; an operand of size 1 along the units' dim does not constrain them."""
        merged: Tensor | None = None
        for tensor in tensors:
            labels = self.labels(tensor)
            labels = torch.full((1,) * tensor.ndim, -1).expand(tensor.shape) if labels is None else labels
            labels = self.root(labels)
            merged = labels if merged is None else self._meet(merged, labels)
        return None if merged is None else merged.expand(torch.broadcast_shapes(merged.shape, out.shape))

    def _meet(self, a: Tensor, b: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(a.shape, b.shape)
        wide = [x.reshape((1,) * (len(shape) - x.ndim) + tuple(x.shape)) for x in (a, b)]
        a, b = sorted(wide, key=lambda x: len(compact(x).unique())) if apart(*wide) else wide
        if apart(a, b):
            self.freeze(a, f"channels along two dimensions{self.at()}")
            a = torch.full_like(a, -1)
        elif spans(a, b):
            self.tie(a, b)
        elif spans(b, a):
            self.tie(b, a)
        if not any(varies(a, d) for d in range(a.ndim)):
            a, b = b, a  # a single unit says less
        a, b = torch.broadcast_tensors(a, b)
        slim = torch.broadcast_tensors(compact(a), compact(b))
        return torch.where(slim[0] >= 0, slim[0], slim[1]).expand(shape)

    def reduce(self, name: str, out: Any, args: Any, kwargs: Any) -> None:
        labels = self.labels(args[0])
        if labels is None or (len(args) > 1 and isinstance(args[1], Tensor)):
            tensors = [t for t in args[:2] if isinstance(t, Tensor)]
            first = tree_leaves(out)[0]
            self.label(first, self.same(first, tensors))
            return
        dims = kwargs.get("dim", next((a for a in args[1:] if isinstance(a, int | tuple | list)), None))
        over = range(labels.ndim) if dims is None else [dims] if isinstance(dims, int) else list(dims)
        over = [d % labels.ndim for d in over]
        roots = self.root(labels)
        if any(varies(roots, d) for d in over):
            self.freeze(roots, f"{name} over channels{self.at()}")
        elif name in SOFT:
            self.label(out, labels)
        else:
            kept = out if isinstance(out, Tensor) else out[0]
            small = roots
            for d in sorted(over, reverse=True):
                small = small.narrow(d, 0, 1) if kept.ndim == roots.ndim else small.select(d, 0)
            self.label(kept, small)


def moving(name: str, single: bool) -> Callable[..., Any]:
    """The function that moves data as the op `name` does."""
    if name in ("T", "mT", "H"):
        return lambda source: getattr(source, name)
    name = name.removesuffix("_as")
    own = getattr(torch.Tensor, name, None) if single else None
    found: Callable[..., Any] = own or getattr(torch, name, None) or getattr(torch.nn.functional, name)
    return found


def void(_: Any) -> None:
    """Forward hooks may not return a value."""
