"""Which channels of a module go together, found by running it once (architecture, "width groups of any module").

Beside each activation travels a LongTensor of its shape that names the *unit* every element belongs to (-1: none). Ops that
only move data run on the labels themselves; elementwise ops tie the labels of their operands; rules exist for the ops that own
or mix parameters. What anything else touches is frozen: never wrong, only less elastic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

MOVES = frozenset(
    (
        "view reshape permute transpose flatten unflatten squeeze unsqueeze expand repeat tile chunk split unbind "
        "__getitem__ cat concat concatenate stack narrow select index_select t T mT H swapaxes swapdims movedim moveaxis "
        "flip roll tensor_split repeat_interleave ravel pixel_shuffle pixel_unshuffle channel_shuffle adjoint view_as "
        "reshape_as expand_as"
    ).split()
)
SAME = frozenset(
    (
        "add sub subtract rsub mul multiply div divide true_divide maximum minimum pow where addcmul addcdiv lerp add_ "
        "__add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ "
        "__itruediv__ __pow__ __rpow__ __neg__ relu relu6 gelu silu mish sigmoid tanh leaky_relu elu selu celu softplus "
        "softsign hardswish hardsigmoid hardtanh logsigmoid threshold softshrink hardshrink tanhshrink rrelu clamp "
        "clamp_min clamp_max clip abs neg exp log log1p expm1 sqrt rsqrt square reciprocal sin cos erf sign nan_to_num "
        "masked_fill dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout contiguous "
        "clone detach to float double half bfloat16 type type_as cpu cuda requires_grad_ data alias positive eq ne lt le "
        "gt ge isnan logical_not zeros_like ones_like rand_like randn_like empty_like bernoulli"
    ).split()
)
REDUCE = frozenset(("mean sum amax amin max min std var norm logsumexp prod all any std_mean var_mean softmax log_softmax").split())
SOFT = {"softmax", "log_softmax"}
SPATIAL = frozenset(
    (
        "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d interpolate "
        "upsample boolean_dispatch _max_pool1d _max_pool2d _max_pool3d _adaptive_max_pool2d instance_norm prelu "
        "batch_norm"
    ).split()
)
DRAWS = frozenset(
    (
        "dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout feature_alpha_dropout rrelu rand_like "
        "randn_like bernoulli rand randn randint randperm normal multinomial poisson"
    ).split()
)
RAW_LIMIT = 1 << 20


class Tracer(TorchFunctionMode):
    """Labels while one forward pass runs; `axes` and `reasons` hold what was learned."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self.names: dict[int, str] = {}
        for name, tensor in tensors:
            self.names.setdefault(id(tensor), name)
        self.parameters = {id(p) for p in model.parameters()}
        self.where = {id(m): name for name, m in model.named_modules()}
        self.axes: dict[tuple[str, int], Tensor] = {}
        self.raw: dict[str, Tensor] = {}
        self.reasons: dict[int, str] = {}
        self.draws = False
        self._parent = torch.empty(0, dtype=torch.long)
        self._stack: list[str] = []

    def run(self, model: nn.Module, *inputs: Tensor) -> None:
        """Trace `model(*inputs)`; its outputs' units are frozen, for they are what the caller reads."""
        before = hooks.register_module_forward_pre_hook(lambda m, _: self._stack.append(self.where.get(id(m), "?")))
        after = hooks.register_module_forward_hook(lambda m, _, __: void(self._stack.pop()), always_call=True)
        try:
            with self:
                out = model(*inputs)
        finally:
            before.remove()
            after.remove()
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
        pairs = torch.stack([x.reshape(-1) for x in torch.broadcast_tensors(compact(a), compact(b))]).unique(dim=1)
        for x, y in pairs.t().tolist():
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
            for unit in compact(labels).unique().tolist():
                if unit >= 0:
                    self.reasons.setdefault(unit, reason)

    def at(self) -> str:
        return f" in {self._stack[-1]}" if self._stack and self._stack[-1] else ""

    # labels of activations and raw parameters

    def labels(self, tensor: Any) -> Tensor | None:
        if id(tensor) in self.parameters and tensor.numel() <= RAW_LIMIT:
            name = self.names[id(tensor)]
            if name not in self.raw:
                self.raw[name] = self.fresh(tensor.numel()).reshape(tensor.shape)
            return self.raw[name]
        return getattr(tensor, "_units", None)

    def label(self, tensor: Any, labels: Tensor | None, raw: bool = False) -> None:
        if labels is not None and isinstance(tensor, Tensor) and bool((compact(labels) >= 0).any()):
            tensor._units, tensor._raw = labels.expand(tensor.shape), raw  # type: ignore[attr-defined]

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
        if name is None:
            self.freeze(units, f"a weight that is computed, not stored{self.at()}")
            self.freeze(getattr(tensor, "_units", None), f"a weight that is computed, not stored{self.at()}")
        elif (name, dim) in self.axes:
            self.tie(self.axes[name, dim], units)
        else:
            self.axes[name, dim] = units

    def settle(self, labels: Tensor) -> Tensor:
        """A cut must stay rectangular: where units vary along several dims, they are tied along all but one."""
        roots = self.root(labels)
        varying = [d for d in range(roots.ndim) if varies(roots, d)]
        if len(varying) > 1:
            main = max(varying, key=lambda d: (len(roots.movedim(d, 0).reshape(roots.shape[d], -1)[:, 0].unique()), d))
            for dim in varying:
                if dim != main:
                    self.tie(roots.narrow(dim, 0, 1), roots)
        return labels

    # one op

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = called(func)
        self.draws |= name in DRAWS
        rule = RULES.get(name)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(isinstance(t, Tensor) for t in tree_leaves(out)):
            return out
        if rule is not None:
            rule(self, out, args, kwargs)
        elif any(self.labels(t) is not None for t in tensors):
            self.plain(name, out, args, kwargs, tensors)
        return out

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
        def swap(value: Any) -> Any:
            if not isinstance(value, Tensor) or (not value.is_floating_point() and self.labels(value) is None):
                return value
            labels = self.labels(value)
            return torch.full(value.shape, -1) if labels is None else labels

        first = args[0] if isinstance(args[0], Tensor) else None
        many = isinstance(args[0], tuple | list)
        raws = [id(t) in self.parameters or getattr(t, "_raw", False) for t in tree_leaves(args[0]) if self.labels(t) is not None]
        source = tree_map(lambda v: swap(v).contiguous() if isinstance(v, Tensor) else v, args[0])
        name = {"view": "reshape"}.get(name, name)
        function = getattr(torch, name) if many else getattr(torch.Tensor, name, None) or getattr(torch, name)
        if name in ("T", "mT", "H"):
            moved = getattr(source, name)
        elif name.endswith("_as"):
            moved = getattr(source, name.removesuffix("_as"))(args[1].shape)
        else:
            moved = function(source, *args[1:], **kwargs)
        pieces = list(moved) if isinstance(moved, tuple | list) else [moved]
        if first is not None:
            self._whole(name, source, pieces)
        for leaf, labels in zip(tree_leaves(out), pieces, strict=True):
            self.label(leaf, labels if raws and all(raws) else self.settle(labels), bool(raws) and all(raws))

    def _whole(self, name: str, source: Tensor, pieces: list[Tensor]) -> None:
        """Pieces of equal size are cut alike; what takes some units and leaves others fixes them all."""
        if len(pieces) > 1 and len({p.shape for p in pieces}) == 1:
            for piece in pieces[1:]:
                self.tie(pieces[0], piece)
        elif any(set(compact(p).unique().tolist()) != set(compact(source).unique().tolist()) for p in pieces):
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
        a, b = wide
        if spans(a, b):
            self.tie(a, b)
        elif spans(b, a):
            self.tie(b, a)
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


def void(_: Any) -> None:
    """Forward hooks may not return a value."""


def called(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name


def compact(labels: Tensor) -> Tensor:
    """Drops repetition along dims of stride 0: the same labels in as few elements as they are stored."""
    for dim, (size, stride) in enumerate(zip(labels.shape, labels.stride(), strict=True)):
        if stride == 0 and size > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def varies(labels: Tensor, dim: int) -> bool:
    if labels.shape[dim] < 2 or labels.stride(dim) == 0:
        return False
    slim = compact(labels)
    return bool((slim != slim.narrow(dim, 0, 1)).any())


def spans(a: Tensor, b: Tensor) -> bool:
    """Whether `b` has a full extent along every dim in which the units of `a` vary."""
    dims = [d for d in range(a.ndim) if varies(a, d)]
    return bool(dims) and all(b.shape[d] > 1 for d in dims)


def channelwise(units: Tensor, ndim: int, dim: int) -> Tensor:
    shape = [1] * ndim
    shape[dim] = len(units)
    return units.reshape(shape)


def argument(args: Any, kwargs: Any, place: int, name: str, default: Any = None) -> Any:
    return kwargs[name] if name in kwargs else args[place] if len(args) > place else default


def positions(*names: str) -> Callable[[Any, Any], Iterator[Any]]:
    """A reader of arguments that may be given by place or by name."""
    return lambda args, kwargs: (argument(args, kwargs, i, name) for i, name in enumerate(names))


def linear(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    x, weight, bias = positions("input", "weight", "bias")(args, kwargs)
    inputs, outputs = t.along(t.labels(x), -1, x.shape[-1]), t.fresh(weight.shape[0])
    dense(t, out, weight, bias, inputs, outputs, 0, 1, -1)


def addmm(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    bias, x, weight = positions("input", "mat1", "mat2")(args, kwargs)
    dense(t, out, weight, bias, t.along(t.labels(x), -1, x.shape[-1]), t.fresh(weight.shape[1]), 1, 0, -1)


def dense(
    t: Tracer, out: Tensor, weight: Tensor, bias: Tensor | None, inputs: Tensor, outputs: Tensor, o: int, i: int, dim: int
) -> None:
    """An op whose parameter `weight` maps units `inputs` (its dim i) to units `outputs` (its dim o)."""
    t.own(weight, i, inputs)
    t.own(weight, o, outputs)
    t.own(bias, 0, outputs)
    t.label(out, channelwise(outputs, out.ndim, dim % out.ndim))


def conv(t: Tracer, out: Tensor, args: Any, kwargs: Any, transposed: bool = False) -> None:
    x, weight, bias = positions("input", "weight", "bias")(args, kwargs)
    groups = argument(args, kwargs, 6, "groups", 1)
    channel = out.ndim - weight.ndim + 1
    inputs = t.along(t.labels(x), channel, x.shape[channel])
    o, i = (1, 0) if transposed else (0, 1)
    if groups == 1:
        dense(t, out, weight, bias, inputs, t.fresh(weight.shape[o]), o, i, channel)
    else:
        grouped(t, out, weight, bias, inputs, groups, transposed, channel)


def grouped(
    t: Tracer, out: Tensor, weight: Tensor, bias: Tensor | None, inputs: Tensor, groups: int, transposed: bool, channel: int
) -> None:
    """Depthwise: each output follows its input. Otherwise every group keeps the same places, so that groups stay equal."""
    depthwise = groups == len(inputs)
    count = out.shape[channel]
    if depthwise:
        outputs = inputs.repeat_interleave(count // groups)
    else:
        outputs = t.fresh(count)
        for units in (inputs.reshape(groups, -1), outputs.reshape(groups, -1)):
            t.tie(units[:1], units)
    t.own(weight, 0, inputs if transposed else outputs)
    if not depthwise:
        t.own(weight, 1, outputs.reshape(groups, -1)[0] if transposed else inputs.reshape(groups, -1)[0])
    t.own(bias, 0, outputs)
    t.label(out, channelwise(outputs, out.ndim, channel))


def batch_norm(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    x, mean, var, weight, bias = positions("input", "running_mean", "running_var", "weight", "bias")(args, kwargs)
    per_channel(t, out, x, [mean, var, weight, bias])


def instance_norm(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    batch_norm(t, out, args, kwargs)


def prelu(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    x, weight = positions("input", "weight")(args, kwargs)
    if weight.numel() > 1:
        per_channel(t, out, x, [weight])
    else:
        t.label(out, t.labels(x))


def per_channel(t: Tracer, out: Tensor, x: Tensor, parameters: list[Tensor | None]) -> None:
    units = t.along(t.labels(x), 1, x.shape[1])
    for parameter in parameters:
        t.own(parameter, 0, units)
    t.label(out, channelwise(units, out.ndim, 1))


def group_norm(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    x, groups, weight, bias = positions("input", "num_groups", "weight", "bias")(args, kwargs)
    units = t.along(t.labels(x), 1, x.shape[1])
    if groups < len(units):
        t.tie(units.reshape(groups, -1)[:1], units.reshape(groups, -1))
    per_channel(t, out, x, [weight, bias])


def layer_norm(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    x, shape, weight, bias = positions("input", "normalized_shape", "weight", "bias")(args, kwargs)
    if len(shape) > 1:
        t.freeze(t.labels(x), f"normalised over several dimensions{t.at()}")
        return
    units = t.along(t.labels(x), -1, x.shape[-1])
    for parameter in (weight, bias):
        t.own(parameter if isinstance(parameter, Tensor) else None, 0, units)
    t.label(out, channelwise(units, out.ndim, out.ndim - 1))


def embedding(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    _, weight = positions("input", "weight")(args, kwargs)
    units = t.fresh(weight.shape[1])
    t.own(weight, 0, torch.full((weight.shape[0],), -1))
    t.own(weight, 1, units)
    t.label(out, channelwise(units, out.ndim, out.ndim - 1))


def matmul(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    a, b = args[0], argument(args, kwargs, 1, "other", kwargs.get("mat2"))
    if id(b) in t.parameters and b.ndim == 2:
        dense(t, out, b, None, t.along(t.labels(a), -1, a.shape[-1]), t.fresh(b.shape[1]), 1, 0, -1)
        return
    la, lb = (torch.full(x.shape, -1) if t.labels(x) is None else t.labels(x) for x in (a, b))
    if a.ndim < 2 or b.ndim < 2:
        t.freeze(la, f"matrix times vector{t.at()}")
        t.freeze(lb, f"matrix times vector{t.at()}")
        return
    la, lb = t.root(la), t.root(lb)  # type: ignore[arg-type]
    inner = varies(la, la.ndim - 1) or varies(lb, lb.ndim - 2)
    if inner:
        if varies(la, la.ndim - 2) or varies(lb, lb.ndim - 1):
            t.freeze(la, f"channels are mixed with other dimensions{t.at()}")
            t.freeze(lb, f"channels are mixed with other dimensions{t.at()}")
        t.tie(la[..., 0, :], lb[..., :, 0])
        return
    t.label(out, t.settle(t._meet(la[..., :1], lb[..., :1, :]).expand(out.shape)))


def attention(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    q, k, v = positions("query", "key", "value")(args, kwargs)
    t.tie(*(channelwise(t.along(t.labels(x), -1, x.shape[-1]), 1, 0) for x in (q, k)))
    units = t.along(t.labels(v), -1, v.shape[-1])
    t.label(out, channelwise(units, out.ndim, out.ndim - 1))


def pad(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    x, sizes = positions("input", "pad")(args, kwargs)
    labels = t.labels(x)
    if labels is None:
        return
    dim = next((d for d in range(x.ndim) if varies(t.root(labels), d)), 1)
    units, place = t.along(labels, dim, x.shape[dim]), 2 * (x.ndim - 1 - dim)
    if place < len(sizes):
        units = torch.nn.functional.pad(units, tuple(sizes[place : place + 2]), value=-1)
    t.label(out, channelwise(units, out.ndim, dim))


def transposed(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    conv(t, out, args, kwargs, transposed=True)


RULES: dict[str, Callable[[Tracer, Any, Any, Any], None]] = {
    "linear": linear,
    "addmm": addmm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), conv),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), transposed),
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "prelu": prelu,
    "group_norm": group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    "embedding": embedding,
    **dict.fromkeys(("matmul", "bmm", "__matmul__", "mm"), matmul),
    "scaled_dot_product_attention": attention,
    "pad": pad,
}
