"""What a tracer knows of channels: which are the same, which parameters consist of them, which cannot be cut and why."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hetfl.submodel.tracing.channels import (
    compact,
    narrow_constant_dims,
    place_along,
    read_along,
    spans,
    varies,
    vary_apart,
    varying_dims,
)  # fmt: skip
from hetfl.submodel.tracing.sizes import Claim, TracedInt

Heads = Literal["width", "whole"]

Key = tuple[str, int]  # a tensor's name and one of its dims

Factors = tuple[Tensor, ...]  # channel ids that vary along some dims, each in the shape of one tensor


class ChannelTable:
    """Channel ids of activations and parameters, and a union-find over them.

    `axes` has the ids of every dim of a parameter that some op owns; `dims` those of parameters that are used otherwise
    (positional embeddings, scales, weights that are normalised first); `claims` the attributes that count channels; `frozen` what
    cannot be cut, and why; `reductions` the channels that an op of the evaluation pass reduces over, by the op's number, for the
    proof. `heads` says what is cut where channels are split into attention heads: the width of every head, or whole heads.
    """

    def __init__(self, model: nn.Module, heads: Heads = "width") -> None:
        self.heads = heads
        self.names: dict[int, str] = {}
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            self.names.setdefault(id(tensor), name)
        stored = (*model.parameters(), *model.buffers())
        self.parameters = {id(t) for t in stored if t.is_floating_point()}  # and buffers
        self.axes: dict[Key, Tensor] = {}
        self.dims: dict[Key, Tensor] = {}
        self.used: list[Tensor] = []  # channels of parameters that others, computed of them, have
        self.reductions: dict[int, list[tuple[int, Tensor]]] = {}
        self.op: int | None = None  # the number of the op at work in the evaluation pass
        self.frozen: list[tuple[Tensor, str]] = []
        self.claims: list[Claim] = []
        self.split: list[tuple[Tensor, int]] = []  # channels that attention has in each of so many heads
        self.packed: set[str] = set()  # tensors with queries, keys and values one after the other
        self.draws = False  # whether an op drew random numbers
        self.stack: list[str] = []  # names of the modules at work, the innermost last
        self._parent = torch.empty(0, dtype=torch.long)

    @property
    def location(self) -> str:
        """` in NAME` of the module at work, to end a reason with."""
        return f" in {self.stack[-1]}" if self.stack and self.stack[-1] else ""

    # union-find: the parents are one tensor, so that whole tensors of ids are looked up at once

    def allocate(self, count: int) -> Tensor:
        """New ids, shape (count,)."""
        start = len(self._parent)
        self._parent = torch.cat([self._parent, torch.arange(start, start + count)])
        return torch.arange(start, start + count)

    def find(self, ids: Tensor) -> Tensor:
        """The representative of each id (same shape; -1 stays)."""
        stored = compact(ids)
        known = stored >= 0
        roots = stored.clamp(min=0)
        while len(self._parent) and not torch.equal(up := self._parent[roots], roots):
            roots = up
        return torch.where(known, roots, stored).expand(ids.shape)

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Unites the channels at equal positions of `a` and `b` (broadcast); a channel that faces -1 is frozen."""
        ones, others = (x.reshape(-1) for x in torch.broadcast_tensors(compact(a), compact(b)))
        base = len(self._parent) + 1
        pairs = ((ones + 1) * base + others + 1)[ones != others].unique()
        for x, y in zip((pairs // base - 1).tolist(), (pairs % base - 1).tolist(), strict=True):
            if x >= 0 and y >= 0:
                x, y = self._find_one(x), self._find_one(y)
                self._parent[max(x, y)] = min(x, y)
            elif max(x, y) >= 0:
                self.freeze(torch.tensor([max(x, y)]), f"joins channels that cannot be cut{self.location}")

    def _find_one(self, channel: int) -> int:
        while (up := int(self._parent[channel])) != channel:
            channel = up
        return channel

    def freeze(self, ids: Tensor | None, reason: str) -> None:
        """Notes that the channels `ids` cannot be cut."""
        if ids is not None:
            self.frozen.append((compact(ids).unique(), reason))

    # ids of activations, and of what is computed of parameters alone

    def ids_of(self, tensor: Any, beside: Tensor | None = None) -> Tensor | None:
        """The ids of an activation, in its shape; None where nothing is known.

        What is computed of parameters alone has channels along several dims: of these, those along the dims in which the ids
        `beside` vary (that many dims from the last), else those along the last dim.
        """
        factors = self.factors_of(tensor)
        if factors is None:
            return getattr(tensor, "_channel_ids", None)
        if beside is None:
            return max(factors, key=lambda ids: varying_dims(ids)[-1], default=None)
        dims = [d - beside.ndim for d in varying_dims(self.find(beside))]
        return next((ids for ids in factors if [d - ids.ndim for d in varying_dims(ids)] == dims), None)

    def factors_of(self, tensor: Any) -> Factors | None:
        """Of a parameter, or what was computed of parameters alone: the channels along each dim; None of anything else."""
        if id(tensor) not in self.parameters:
            return getattr(tensor, "_factors", None)
        name, found = self.names[id(tensor)], []
        for dim, size in enumerate(tensor.shape):
            if size > 1:
                if (name, dim) not in self.dims:
                    self.dims[name, dim] = self.allocate(size)
                found.append(place_along(self.dims[name, dim], tensor.ndim, dim).expand(tensor.shape))
        return tuple(found)

    def is_raw(self, tensor: Any) -> bool:
        """Whether a tensor is a parameter, or was computed of parameters alone."""
        return id(tensor) in self.parameters or hasattr(tensor, "_factors")

    def assign(self, tensor: Any, ids: Tensor | None) -> None:
        """Gives an activation its channel ids (broadcast to its shape)."""
        if ids is not None and isinstance(tensor, Tensor) and bool((compact(ids) >= 0).any()):
            tensor._channel_ids = narrow_constant_dims(ids).expand(tensor.shape)  # type: ignore[attr-defined]

    def assign_factors(self, tensor: Any, factors: Factors, lost: str = "") -> None:
        """Gives what was computed of parameters alone its channels along each dim; `lost`: the op that they do not survive."""
        if isinstance(tensor, Tensor):
            kept = [ids.expand(tensor.shape) for ids in map(narrow_constant_dims, factors) if varying_dims(ids)]
            tensor._factors, tensor._lost = tuple(kept), lost  # type: ignore[attr-defined]

    def note_reduction(self, dims: list[tuple[int, Tensor]]) -> None:
        """Notes that the op at work reduces over these channels, shape (size,), along these dims of its first operand."""
        if self.op is not None and dims:
            self.reductions[self.op] = dims

    def along(self, ids: Tensor | None, dim: int, size: int) -> Tensor:
        """The channels along one dim, shape (size,); where they also vary along another dim, all are frozen and -1 is returned."""
        if ids is None:
            return torch.full((size,), -1)
        moved = compact(self.find(ids).movedim(dim, 0))
        stored = moved.reshape(moved.shape[0], -1)
        if bool((stored != stored[:, :1]).any()):
            self.freeze(stored, f"channels are mixed with other dimensions{self.location}")
            return torch.full((size,), -1)
        return stored[:, 0].expand(size).contiguous()

    def combine(self, a: Tensor, b: Tensor) -> Tensor:
        """The ids of an elementwise result, in the broadcast shape of `a` and `b`.

        Channels that face one another are tied; an operand of size 1 along the channels' dim does not constrain them, and channels
        along two dims (an outer product) freeze the smaller set.
        """
        shape = torch.broadcast_shapes(a.shape, b.shape)
        wide = [x.reshape((1,) * (len(shape) - x.ndim) + tuple(x.shape)) for x in (a, b)]
        a, b = sorted(wide, key=lambda x: len(compact(x).unique())) if vary_apart(*wide) else wide
        if vary_apart(a, b):
            self.freeze(a, f"channels along two dimensions{self.location}")
            a = torch.full_like(a, -1)
        elif spans(a, b):
            self.tie(a, b)
        elif spans(b, a):
            self.tie(b, a)
        if not any(varies(a, d) for d in range(a.ndim)):
            a, b = b, a  # a single channel says less
        a, b = torch.broadcast_tensors(a, b)
        first, second = torch.broadcast_tensors(compact(a), compact(b))
        return torch.where(first >= 0, first, second).expand(shape)

    def make_rectangular(self, ids: Tensor, heads: bool = False, prefer: int | None = None) -> Tensor:
        """Ties channels so that a cut leaves a rectangle: where they vary along several dims, along all of these but one.

        That one is the last of those with the most channels (within a factor of 4), the head width where heads are split; with
        `heads`, the last but one; or `prefer`. Example: (batch, tokens, 4 heads, 16 width) of 64 channels becomes 16 channels that
        every head has. Returns `ids`.
        """
        roots = self.find(ids)
        varying = [d for d in range(roots.ndim) if varies(roots, d)]
        if len(varying) > 1:
            counts = {d: len(roots.movedim(d, 0).reshape(roots.shape[d], -1)[:, 0].unique()) for d in varying}
            main = max(d for d in varying if 4 * counts[d] >= max(counts.values()))
            main = varying[-2] if heads else prefer if prefer in varying else main
            for dim in varying:
                if dim != main:
                    self.tie(roots.narrow(dim, 0, 1), roots)
        return ids

    # parameters and attributes

    def own(self, tensor: Tensor | None, dim: int, ids: Tensor) -> None:
        """Notes that dim `dim` of a parameter or buffer, or of what is computed of them, consists of channels `ids`, (size,)."""
        if tensor is None:
            return
        name = self.names.get(id(tensor))
        if name is None:
            self._own_computed(tensor, dim, ids)
        elif (name, dim) in self.axes:
            self.tie(self.axes[name, dim], ids)
        else:
            self.axes[name, dim] = ids

    def _own_computed(self, tensor: Tensor, dim: int, ids: Tensor) -> None:
        """As `own`; where several dims of parameters were joined, the dim with the most channels is the one meant."""
        lines = [line for f in self.factors_of(tensor) or () if (line := read_along(f, dim % tensor.ndim)) is not None]
        lines.sort(key=lambda line: -len(line.unique()))
        if lines:
            self.tie(lines[0], ids)
            self.used.append(ids)
        elif tensor.shape[dim] > 1:
            lost = getattr(tensor, "_lost", "")
            self.freeze(ids, f"a weight that is computed{' by ' + lost if lost else ', not stored'}{self.location}")
        for line in lines[1:]:
            self.freeze(line, f"joins channels that cannot be cut{self.location}")

    def claim(self, size: Any, ids: Tensor) -> None:
        """Notes that `size`, where it was read from an attribute of a module, counts the channels `ids`."""
        if isinstance(size, TracedInt) and size.attribute is not None:
            self.claims.append(Claim(size.attribute, ids, size.share))

    def claim_attribute(self, name: str, ids: Tensor) -> None:
        """Notes that attribute `name` of the module at work counts the channels `ids`."""
        if self.stack and self.stack[-1] != "?":
            self.claims.append(Claim((self.stack[-1], name), ids, Fraction(1)))

    def bind(self, size: TracedInt, ids: Tensor | None) -> None:
        """Notes that `size` was used where the channels `ids` lie (None: something that is never cut)."""
        if size.ids is None:
            if ids is not None:
                self.claim(size, ids)
        elif ids is None:
            self.freeze(size.ids, f"their number shapes something else{self.location}")
        else:
            small, big = sorted((size.ids, ids), key=len)
            self.tie(small[None], big.reshape(-1, len(small)))

    def trace_shape(self, tensor: Any) -> list[Any]:
        """The sizes of an activation, those of dims of channels as TracedInts."""
        ids = getattr(tensor, "_channel_ids", None)
        sizes: list[Any] = list(tensor.shape)
        if ids is not None:
            roots = self.find(ids)
            for dim in range(roots.ndim):
                if (line := read_along(roots, dim)) is not None:
                    sizes[dim] = TracedInt.of(self.claims, sizes[dim], line)
        return sizes
