"""Dropout, and other random ops of a forward pass, drawn from the client's own generator.

torch draws them from one default generator, which all threads of a process share: clients that train at the same time on worker
threads would take numbers from each other, and a run's result would depend on the number of workers. torch's dropout, attention and
recurrent layers take no generator as an argument, so a TorchFunctionMode computes them step by step with one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from hetfl.submodel.tracing.channels import op_name

DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout")

TAKES_GENERATOR = frozenset("rand randn randint randperm bernoulli normal multinomial uniform exponential".split())

RECURRENT = frozenset("lstm gru rnn_tanh rnn_relu".split())

ATTENTION = (  # the parameters of multi_head_attention_forward that torch's layer passes by position
    "query key value embed_dim num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn dropout_p out_proj_weight "
    "out_proj_bias"
).split()


def seeded_random(needed: bool, generator: torch.Generator) -> AbstractContextManager[Any]:
    """While it lasts, this thread's random ops draw from `generator` (CPU); with `needed` False it changes nothing."""
    return SeededRandomMode(generator) if needed else nullcontext()


class SeededRandomMode(TorchFunctionMode):
    """Replaces this thread's random ops by equal ones that draw from `generator`, whatever device the tensors are on."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = op_name(func).removesuffix("_")
        if name in DROPOUTS:
            return self.drop(name, *args, **kwargs)
        if name == "scaled_dot_product_attention" and kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0) > 0:
            return self.attend(*args, **kwargs)
        if name == "multi_head_attention_forward" and args[10] > 0 and kwargs.get("training", True):
            return self.attend_heads(args, kwargs)
        if name in RECURRENT and has_layer_dropout(args):
            return self.run_layers(func, args)
        if name in ("rand_like", "randn_like"):
            make = torch.rand if name == "rand_like" else torch.randn
            drawn: Tensor = make(args[0].shape, generator=self.generator, dtype=kwargs.get("dtype") or args[0].dtype)
            return drawn.to(args[0].device)
        if name in TAKES_GENERATOR:
            kwargs.setdefault("generator", self.generator)
            return draw_in_main_memory(func, args, kwargs)
        return func(*args, **kwargs)

    def drop(self, name: str, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Dropout of x with probability `p`: of entries, or (dropout1d, feature_dropout …) of whole channels (N, C, …)."""
        if not training or p == 0:
            return x
        shape = x.shape if name == "dropout" else x.shape[:2] + (1,) * (x.ndim - 2)
        mask = torch.bernoulli(torch.full(shape, 1 - p, dtype=x.dtype), generator=self.generator).to(x.device)
        return x * mask / (1 - p) if p < 1 else x * 0

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, **_: Any,
    ) -> Tensor:  # fmt: skip
        """scaled_dot_product_attention of q (…, L, E), k (…, S, E) and v (…, S, V), step by step: (…, L, V)."""
        scores = q @ k.transpose(-2, -1) * (scale or 1 / math.sqrt(q.shape[-1]))
        if is_causal:
            attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        return self.drop("dropout", scores.softmax(-1), dropout_p) @ v

    def attend_heads(self, args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """torch.nn.functional.multi_head_attention_forward on (L, N, E) or (L, E), step by step: outputs and attention weights."""
        a = dict(zip(ATTENTION, args, strict=False)) | kwargs
        batched = a["query"].ndim == 3
        x = [a[n] if batched else a[n].unsqueeze(1) for n in ("query", "key", "value")]
        heads = int(a["num_heads"])
        q, k, v = project_inputs(x, a)
        if a["bias_k"] is not None:
            k, v = (torch.cat([t, b.expand(1, t.shape[1], -1)]) for t, b in ((k, a["bias_k"]), (v, a["bias_v"])))
        if a["add_zero_attn"]:
            k, v = (torch.cat([t, torch.zeros_like(t[:1])]) for t in (k, v))
        q, k, v = (t.unflatten(2, (heads, -1)).permute(1, 2, 0, 3) for t in (q, k, v))
        mask = sum_masks(a, x[1].shape[:2], q.shape[0], heads, k.shape[2])
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + mask
        weights = self.drop("dropout", scores.softmax(-1), a["dropout_p"])
        out = F.linear((weights @ v).permute(2, 0, 1, 3).flatten(2), a["out_proj_weight"], a["out_proj_bias"])
        shown = weights.mean(1) if a.get("average_attn_weights", True) else weights
        shown = shown if batched else shown.squeeze(0)
        return out if batched else out.squeeze(1), shown if a.get("need_weights", True) else None

    def run_layers(self, func: Callable[..., Any], args: Any) -> Any:
        """The layers of a recurrent network one by one, with dropout between them; answers as `func` (torch.lstm …) does.

        `func` takes (x, [batch_sizes,] state, weights, has_biases, num_layers, dropout, train, bidirectional[, batch_first]).
        """
        place = next(i for i, a in enumerate(args) if isinstance(a, list))
        x, middle, state, flat = args[0], args[1 : place - 1], args[place - 1], args[place]
        (biased, layers, p, training, both), rest = args[place + 1 : place + 6], args[place + 6 :]
        directions, each, last = 2 if both else 1, len(flat) // layers, []
        for layer in range(layers):
            own = slice(layer * directions, (layer + 1) * directions)
            start = tuple(s[own] for s in state) if isinstance(state, tuple | list) else state[own]
            weights = flat[layer * each : (layer + 1) * each]
            x, *ends = func(x, *middle, start, weights, biased, 1, 0.0, training, both, *rest)
            last.append(ends)
            x = self.drop("dropout", x, p) if layer < layers - 1 else x
        return (x, *(torch.cat(parts) for parts in zip(*last, strict=True)))


def draw_in_main_memory(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """`func` with a generator of main memory: what is to lie on another device is drawn in main memory and moved."""
    own = args[0] if args and isinstance(args[0], Tensor) else None
    device = torch.device(kwargs.get("device") or "cpu") if own is None else own.device
    if device.type == "cpu" or torch.device(kwargs["generator"].device).type != "cpu":
        return func(*args, **kwargs)
    if own is None:
        return func(*args, **{**kwargs, "device": None}).to(device)
    drawn = func(own.cpu(), *args[1:], **kwargs)
    return own.copy_(drawn) if op_name(func).endswith("_") else drawn.to(device)


def project_inputs(x: list[Tensor], a: dict[str, Any]) -> list[Tensor]:
    """Queries, keys and values (L, N, E) from the packed or the three separate projections."""
    weights = [a.get(f"{n}_proj_weight") for n in "qkv"] if a.get("use_separate_proj_weight") else a["in_proj_weight"].chunk(3)
    biases = [None] * 3 if a["in_proj_bias"] is None else a["in_proj_bias"].chunk(3)
    return [F.linear(t, w, b) for t, w, b in zip(x, weights, biases, strict=True)]


def sum_masks(a: dict[str, Any], keys: torch.Size, batch: int, heads: int, size: int) -> Tensor:
    """What is added to scores (N, heads, L, size): minus infinity where a bool mask is True, and the values of a float mask.

    `keys` is (S, N) of the keys as given; the `size` - S keys that attention adds itself are masked nowhere.
    """
    total = torch.zeros((), device=a["query"].device)
    for mask, shape in (
        (a.get("attn_mask"), (-1, heads, a["query"].shape[0], keys[0])),
        (a.get("key_padding_mask"), (batch, 1, 1, keys[0])),
    ):
        if mask is not None:
            added = torch.zeros(mask.shape, device=mask.device).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask
            added = added.expand(batch * heads, -1, -1) if added.ndim == 2 and shape[0] == -1 else added
            total = total + F.pad(added.reshape(shape), (0, size - keys[0]))
    return total


def has_layer_dropout(args: Any) -> bool:
    """Whether a call of torch.lstm and its like, whose weights are the list in `args`, drops between layers."""
    place = next(i for i, a in enumerate(args) if isinstance(a, list))
    return bool(args[place + 2] > 1 and args[place + 3] > 0 and args[place + 4])
