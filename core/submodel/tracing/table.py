"""What a tracer knows of channels: which are the same, which parameters consist of them, which cannot be cut and why."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hetfl.submodel.tracing.channels import compact, narrow_constant_dims, read_along, spans, varies, vary_apart
from hetfl.submodel.tracing.sizes import Claim, TracedInt

Heads = Literal["width", "whole"]

LARGEST_RAW = 1 << 20  # entries of a parameter up to which each gets an id of its own when it is used like an activation


class ChannelTable:
    """Channel ids of activations and parameters, and a union-find over them.

    `axes` has the ids of every dim of a parameter that some op owns; `raw` those of parameters used like activations (positional
    embeddings, scales), an id for each entry; `claims` the attributes that count channels; `frozen` what cannot be cut, and why.
    `heads` says what is cut where channels are split into attention heads: the width of every head, or whole heads.
    """

    def __init__(self, model: nn.Module, heads: Heads = "width") -> None:
        self.heads = heads
        self.names: dict[int, str] = {}
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ):
            self.names.setdefault(id(tensor), name)
        state = model.state_dict(keep_vars=True)
        self.parameters = {id(t) for t in state.values() if t.is_floating_point()}  # and buffers that travel
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.raw: dict[str, Tensor] = {}
        self.frozen: list[tuple[Tensor, str]] = []
        self.claims: list[Claim] = []
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

    # ids of activations and of parameters used like them

    def ids_of(self, tensor: Any) -> Tensor | None:
        """The ids of an activation, in its shape; of a parameter one for each entry; None where nothing is known."""
        if id(tensor) in self.parameters and 1 < tensor.numel() <= LARGEST_RAW:
            name = self.names[id(tensor)]
            if name not in self.raw:
                self.raw[name] = self.allocate(tensor.numel()).reshape(tensor.shape)
            return self.raw[name]
        return getattr(tensor, "_channel_ids", None)

    def is_raw(self, tensor: Any) -> bool:
        """Whether a tensor is a parameter, or was made of parameters alone."""
        return id(tensor) in self.parameters or getattr(tensor, "_raw", False)

    def assign(self, tensor: Any, ids: Tensor | None, raw: bool = False) -> None:
        """Gives an activation its channel ids (broadcast to its shape); `raw`: it was made of parameters alone."""
        if ids is not None and isinstance(tensor, Tensor) and bool((compact(ids) >= 0).any()):
            tensor._channel_ids, tensor._raw = narrow_constant_dims(ids).expand(tensor.shape), raw  # type: ignore[attr-defined]

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
        """Notes that dim `dim` of a parameter or buffer consists of the channels `ids`, shape (size,)."""
        if tensor is None:
            return
        name = self.names.get(id(tensor))
        if name is None and tensor.ndim == 1 and getattr(tensor, "_raw", False):
            self.tie(tensor._channel_ids, ids)  # type: ignore[attr-defined]
        elif name is None:
            self.freeze(ids, f"a weight that is computed, not stored{self.location}")
            self.freeze(getattr(tensor, "_channel_ids", None), f"a weight that is computed, not stored{self.location}")
        elif (name, dim) in self.axes:
            self.tie(self.axes[name, dim], ids)
        else:
            self.axes[name, dim] = ids

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
