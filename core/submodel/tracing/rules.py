"""What ops that own or mix parameters do to the labels of their operands: one rule an op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hetfl.submodel.tracing.channels import channelwise, line_of, varies

if TYPE_CHECKING:
    from hetfl.submodel.tracing.tracer import Tracer


def argument(args: Any, kwargs: Any, place: int, name: str, default: Any = None) -> Any:
    return kwargs[name] if name in kwargs else args[place] if len(args) > place else default


def positions(*names: str) -> Callable[[Any, Any], Iterator[Any]]:
    """A reader of arguments that may be given by place or by name."""
    return lambda args, kwargs: (argument(args, kwargs, i, name) for i, name in enumerate(names))


def linear(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    x, weight, bias = positions("input", "weight", "bias")(args, kwargs)
    if across(t, x, out):
        return
    inputs, outputs = t.along(t.labels(x), -1, x.shape[-1]), t.fresh(weight.shape[0])
    dense(t, out, weight, bias, inputs, outputs, 0, 1, -1)


def across(t: Tracer, x: Tensor, out: Tensor) -> bool:
    """Mixing along the last dim leaves channels that lie along another dim as they are (MLP-Mixer's tokens)."""
    labels = t.labels(x)
    if labels is None or varies(roots := t.root(labels), x.ndim - 1) or not any(varies(roots, d) for d in range(x.ndim)):
        return False
    t.label(out, roots.narrow(x.ndim - 1, 0, 1).expand(*x.shape[:-1], out.shape[-1]))
    return True


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
    depthwise = int(groups) == len(inputs)
    if depthwise:
        t.claim(groups, inputs)
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
    if argument(args, kwargs, 3, "weight") is None and argument(args, kwargs, 0, "input").shape[1] > 1:
        t.claim("num_features", t.along(t.labels(out), 1, out.shape[1]), module=True)


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
    if int(groups) < len(units):
        t.tie(units.reshape(groups, -1)[:1], units.reshape(groups, -1))
    else:
        t.claim(groups, units)
    per_channel(t, out, x, [weight, bias])


def layer_norm(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    x, shape, weight, bias = positions("input", "normalized_shape", "weight", "bias")(args, kwargs)
    if len(shape) > 1:
        t.freeze(t.labels(x), f"normalised over several dimensions{t.at()}")
        return
    units = t.along(t.labels(x), -1, x.shape[-1])
    if weight is None:
        t.claim("normalized_shape", units, module=True)
    for parameter in (weight, bias if isinstance(bias, Tensor) else None):
        t.own(parameter, 0, units)
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
    """Queries and keys meet along the head width; where heads are cut whole, all three are cut along the heads."""
    q, k, v = positions("query", "key", "value")(args, kwargs)
    t.draws |= argument(args, kwargs, 4, "dropout_p", 0.0) > 0
    roots = [torch.full(x.shape, -1) if t.labels(x) is None else t.root(t.labels(x)) for x in (q, k, v)]  # type: ignore[arg-type]
    heads = next((d for r in roots for d in range(r.ndim - 2) if varies(r, d)), None)
    if heads is not None:
        lines = [t.along(r, heads, r.shape[heads]) for r in roots]
        for line in lines[:2]:
            t.tie(lines[2], line)
        t.label(out, channelwise(lines[2], out.ndim, heads))
        return
    t.tie(t.along(roots[0], -1, q.shape[-1]), t.along(roots[1], -1, k.shape[-1]))
    t.label(out, channelwise(t.along(roots[2], -1, v.shape[-1]), out.ndim, out.ndim - 1))


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


def multihead(t: Tracer, out: Any, args: Any, kwargs: Any) -> None:
    """torch.nn.MultiheadAttention: one embedding of heads x width everywhere, so its channels are cut with the heads."""
    q, k, v, size, heads, packed, packed_bias, bias_k, bias_v, _, p, weight, bias = positions(
        "query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v",
        "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias",
    )(args, kwargs)  # fmt: skip
    t.draws |= p > 0 and argument(args, kwargs, 13, "training", True)
    whole = t.heads == "whole"
    width = int(size) // heads
    units = t.fresh(int(heads) if whole else width)
    inner = units.repeat_interleave(width) if whole else units.repeat(heads)
    lines = [t.along(t.labels(x), -1, x.shape[-1]) for x in (q, k, v)]
    t.tie(lines[0], inner)
    if packed is not None:
        for line in lines[1:]:
            t.tie(lines[0], line)
        t.own(packed, 0, inner.repeat(3))
        t.own(packed, 1, inner)
    for name, line in zip("qkv", lines, strict=True):
        own_matrix(t, kwargs.get(f"{name}_proj_weight") if packed is None else None, None, inner, line)
    t.own(packed_bias, 0, inner.repeat(3))
    for extra in (bias_k, bias_v):
        t.own(extra, 2, inner)
    t.claim(size, inner)
    t.claim("embed_dim", inner, module=True)
    t.claim("num_heads" if whole else "head_dim", units, module=True)
    outputs = t.fresh(weight.shape[0])
    own_matrix(t, weight, bias, outputs, inner)
    t.label(out[0], channelwise(outputs, out[0].ndim, out[0].ndim - 1))


def own_matrix(t: Tracer, weight: Tensor | None, bias: Tensor | None, outputs: Tensor, inputs: Tensor) -> None:
    t.own(weight, 0, outputs)
    t.own(weight, 1, inputs)
    t.own(bias, 0, outputs)


def recurrent(t: Tracer, out: Any, args: Any, kwargs: Any) -> None:
    """LSTM, GRU and RNN: one number of hidden units for all layers and directions, the gates stacked in the rows."""
    place = next(i for i, a in enumerate(args) if isinstance(a, list))
    x, state, flat, (biased, layers, p, training, both) = args[0], args[place - 1], args[place], args[place + 1 : place + 6]
    t.draws |= p > 0 and training
    hidden = t.fresh(flat[1].shape[1])
    follow(t, state, hidden)
    ways = 2 if both else 1
    each = len(flat) // (layers * ways)
    inputs = t.along(t.labels(x), -1, x.shape[-1])
    for layer in range(layers):
        for way in range(ways):
            start = (layer * ways + way) * each
            rows = hidden.repeat(flat[start].shape[0] // len(hidden))
            own_matrix(t, flat[start], flat[start + 2] if biased else None, rows, inputs)
            own_matrix(t, flat[start + 1], flat[start + 3] if biased else None, rows, hidden)
            if each > (4 if biased else 2):
                t.freeze(hidden, f"projected states{t.at()}")
        inputs = hidden.repeat(ways)
    t.claim("hidden_size", hidden, module=True)
    for leaf in out if isinstance(out, tuple) else [out]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            line = inputs if leaf is out[0] else hidden
            t.label(leaf, channelwise(line, leaf.ndim, leaf.ndim - 1))


def cell(t: Tracer, out: Any, args: Any, kwargs: Any) -> None:
    """One step of LSTMCell, GRUCell or RNNCell."""
    x, state, w_ih, w_hh, b_ih, b_hh = (*args, None, None)[:6]
    hidden = t.fresh(w_hh.shape[1])
    follow(t, state, hidden)
    rows = hidden.repeat(w_hh.shape[0] // len(hidden))
    own_matrix(t, w_ih, b_ih, rows, t.along(t.labels(x), -1, x.shape[-1]))
    own_matrix(t, w_hh, b_hh, rows, hidden)
    t.claim("hidden_size", hidden, module=True)
    for leaf in out if isinstance(out, tuple) else [out]:
        t.label(leaf, channelwise(hidden, leaf.ndim, leaf.ndim - 1))


def follow(t: Tracer, state: Any, hidden: Tensor) -> None:
    """A recurrent state that holds channels holds those of the layer."""
    for tensor in state if isinstance(state, tuple | list) else [state]:
        if (labels := t.labels(tensor)) is not None:
            t.tie(hidden, t.along(labels, -1, tensor.shape[-1]))


def einsum(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    """Letters are dims: the operands' units are tied letter by letter; a parameter's last letter of the output is its outputs'."""
    operands = args[1] if isinstance(args[1], tuple | list) else args[1:]
    equation = args[0].replace(" ", "") if isinstance(args[0], str) else ""
    if "->" not in equation or "." in equation:
        for x in operands:
            t.freeze(t.labels(x), f"unknown operation einsum{t.at()}")
        return
    ins, outs = equation.split("->")
    spelt = list(zip(operands, ins.split(","), strict=True))
    lines = activations(t, [(x, letters) for x, letters in spelt if id(x) not in t.parameters])
    for x, letters in spelt:
        if id(x) in t.parameters:
            fresh = [c for c in letters if c not in lines and c in outs][-1:]
            lines |= {c: t.fresh(x.shape[letters.index(c)]) for c in fresh}
            for dim, letter in enumerate(letters):
                t.own(x, dim, lines.get(letter, torch.full((x.shape[dim],), -1)))
    varying = [c for c in outs if c in lines]
    for letter in varying[:-1]:
        t.freeze(lines[letter], f"channels are mixed with other dimensions{t.at()}")
    if varying:
        t.label(out, channelwise(lines[varying[-1]], out.ndim, outs.index(varying[-1])))


def activations(t: Tracer, spelt: list[tuple[Tensor, str]]) -> dict[str, Tensor]:
    """The units of each letter; where an operand has the letter but not the units, these are frozen."""
    lines: dict[str, Tensor] = {}
    borne = [channel_of(t, x) for x, _ in spelt]
    for (_, letters), found in zip(spelt, borne, strict=True):
        if found is not None:
            dim, line = found
            t.tie(lines.setdefault(letters[dim], line), line)
    for (x, letters), found in zip(spelt, borne, strict=True):
        for dim, letter in enumerate(letters):
            if letter in lines and x.shape[dim] > 1 and (found is None or found[0] != dim):
                t.freeze(lines[letter], f"joins channels that cannot be cut{t.at()}")
    return lines


def channel_of(t: Tracer, x: Tensor) -> tuple[int, Tensor] | None:
    """The one dim along which the units of an activation vary, and these; None (and frozen) where there is not one."""
    labels = t.labels(x)
    if labels is None:
        return None
    roots = t.root(labels)
    found = [(d, line) for d in range(x.ndim) if (line := line_of(roots, d)) is not None]
    if not found:
        t.freeze(labels, f"channels are mixed with other dimensions{t.at()}")
    return found[0] if found else None


def unfold(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    """Patches: torch.nn.functional.unfold lays each channel's window side by side; Tensor.unfold only moves data."""
    if out.ndim > args[0].ndim:
        t.move("unfold", out, args, kwargs)
        return
    units = t.along(t.labels(args[0]), 1, args[0].shape[1])
    t.label(out, channelwise(units.repeat_interleave(out.shape[1] // len(units)), out.ndim, 1))


def fold(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    units = t.along(t.labels(args[0]), -2, args[0].shape[-2]).reshape(out.shape[-3], -1)
    t.tie(units[:, :1], units)
    t.label(out, channelwise(units[:, 0], out.ndim, out.ndim - 3))


def glu(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    labels = t.labels(args[0])
    if labels is not None:
        first, second = labels.chunk(2, argument(args, kwargs, 1, "dim", -1))
        t.tie(first, second)
        t.label(out, first)


def normalize(t: Tracer, out: Tensor, args: Any, kwargs: Any) -> None:
    """Over channels too: a zero adds nothing to a norm."""
    t.label(out, t.labels(args[0]))


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
    "multi_head_attention_forward": multihead,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), cell),
    "einsum": einsum,
    "unfold": unfold,
    "fold": fold,
    "glu": glu,
    "normalize": normalize,
    "pad": pad,
}
