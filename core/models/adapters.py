"""Low-rank adapters (LoRA, Hu et al., ICLR 2022) in the layers of any module, whose own parameters are then not trained.

The ranks of an adapter are the channels between its two halves, so they are a width group like any other: lora_A's rows and
lora_B's columns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetfl.errors import NotApplicable, UsageError, nearest, unknown
from hetfl.models.features import find_heads

KEYS = ("rank", "alpha", "target", "heads")
HEADS = ("trained", "frozen")
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
READ_BY_PARENT = (nn.MultiheadAttention, nn.TransformerEncoderLayer)  # which read their children's weights, not their outputs
MOST_RANKS = 1 << 14
OWN = "own"  # --adapter: the model brings adapters of its own


@dataclass(frozen=True)
class AdapterSpec:
    """What --adapter says: LoRA of `rank` in the layers that `target` names, its output times `alpha` / `rank`.

    `heads`: whether the layers that answer as the model is to are trained whole.
    """

    rank: int = 8
    alpha: float = 16.0
    target: str = "linear"
    heads: bool = True

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def parse_adapter(text: str) -> AdapterSpec | None:
    """The adapters that a text such as lora:rank=16,alpha=32,target=attention asks for; None for "own", those of the model itself.

    Raises UsageError for what is none.
    """
    kind, _, rest = text.partition(":")
    if text == OWN:
        return None
    if kind != "lora":
        raise UsageError(
            f"unknown adapter '{kind}'{nearest(kind, ['lora', OWN])} (known: lora:rank=8,alpha=16,target=linear; {OWN})"
        )
    given = {"rank": "8", "alpha": "16", "target": "linear", "heads": "trained"} | split_options(text, rest)
    if given["heads"] not in HEADS:
        raise unknown("choice of heads", given["heads"], HEADS)
    try:
        rank, alpha = int(given["rank"]), float(given["alpha"])
    except ValueError:
        rank, alpha = 0, 0.0
    if not 1 <= rank <= MOST_RANKS or not 0 < alpha < math.inf:
        raise UsageError(f"--adapter {text}: the rank is a count from 1 to {MOST_RANKS:,}, alpha a number above 0")
    try:
        re.compile(given["target"])
    except re.error as error:
        raise UsageError(f"--adapter {text}: the target is no regular expression: {error}") from error
    return AdapterSpec(rank, alpha, given["target"], given["heads"] == "trained")


def split_options(text: str, rest: str) -> dict[str, str]:
    """The options name=value,… of an adapter, `rest` of its `text`. Raises UsageError for one unknown, empty or given twice."""
    given: dict[str, str] = {}
    for pair in re.split(rf",(?=(?:{'|'.join(KEYS)})=)", rest) if rest else ():
        key, _, value = pair.partition("=")
        if key not in KEYS:
            raise UsageError(f"an adapter has no option '{key}'{nearest(key, KEYS)} (known: {', '.join(KEYS)})")
        if key in given or not value:
            raise UsageError(f"--adapter {text}: '{key}' is given {'twice' if key in given else 'no value'}")
        given[key] = value
    return given


class Lora(nn.Module):
    """`base_layer`(x) + `scale` * B A x, with A of `rank` rows; B starts at 0, so that nothing changes before training.

    `scale` is alpha / rank of the whole adapter and stays so where ranks are cut: a client of fewer ranks adds up fewer of the same
    terms. With a `change` (`add_changes`), of the base's weight and in its shape, `scale` times that is added to the weight.
    """

    change: Tensor | None

    def __init__(self, base_layer: nn.Module, rank: int, scale: float) -> None:
        super().__init__()
        self.base_layer, self.scale = base_layer, scale
        self.lora_A, self.lora_B = make_halves(base_layer, rank)
        nn.init.zeros_(self.lora_B.weight)  # type: ignore[arg-type]
        self.register_buffer("change", None)

    def __getattr__(self, name: str) -> Any:
        """As of any module, but that nobody can read a weight here: who computed with it would pass the adapter by."""
        if name in ("weight", "bias"):
            raise AttributeError(f"a module reads the {name} of a layer with an adapter: name others (--adapter lora:target=REGEX)")
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        learned: Tensor = self.lora_B(self.lora_A(x))
        if self.change is not None:
            learned = learned + apply_weight(self.base_layer, x, self.change)
        out: Tensor = self.base_layer(x) + self.scale * learned
        return out


def apply_weight(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What `layer`, a linear one or a convolution, makes of x with another weight and no bias."""
    apply = getattr(layer, "_conv_forward", F.linear)
    out: Tensor = apply(x, weight) if apply is F.linear else apply(x, weight, None)
    return out


def make_halves(layer: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
    """A and B of a linear layer; of a convolution, A is one of its kernel and stride to `rank` channels and B pointwise."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=False)
    assert isinstance(layer, CONVS)
    make: Any = type(layer)
    how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "padding_mode": layer.padding_mode}
    return make(layer.in_channels, rank, layer.kernel_size, bias=False, **how), make(rank, layer.out_channels, 1, bias=False)


def add_adapters(model: nn.Module, spec: AdapterSpec, x: Tensor, answer: tuple[int, ...]) -> nn.Module:
    """Puts adapters into `model`, in place, and freezes all of its own parameters but those of layers that answer as the model is
    to, with `answer` numbers an example: these heads are trained whole, where `spec` does not have them frozen.

    `x` is a batch to find the heads with. Raises NotApplicable where no layer is one that `spec` names.
    """
    heads = find_heads(model, x, answer)
    layers = dict(model.named_modules())
    chosen = [name for name in list_targets(model, spec.target) if name not in heads]
    if not chosen:
        raise NotApplicable(f"not applicable: {explain_no_target(model, spec.target)}")
    model.requires_grad_(False)
    for name in heads:
        layers[name].requires_grad_(spec.heads)
    for name in chosen:
        parent, _, attribute = name.rpartition(".")
        setattr(layers[parent], attribute, Lora(layers[name], spec.rank, spec.scale))
    return model


def add_changes(model: nn.Module) -> nn.Module:
    """Gives every layer of `model` that has an adapter of ours a change of its base's weight, 0 at first, in place: a part of the
    model's state that no training touches, where the base itself is not to be written to.

    Raises NotApplicable where there is no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, Lora)]
    if not layers:
        raise NotApplicable("not applicable: no layer has an adapter of hetfl's own to add to (--adapter lora:rank=8)")
    for layer in layers:
        assert isinstance(layer.base_layer.weight, Tensor)
        layer.change = torch.zeros_like(layer.base_layer.weight, requires_grad=False)
    return model


def list_targets(model: nn.Module, target: str) -> list[str]:
    """The names of the layers that can have an adapter and that `target` names: a kind, or a regular expression for the name."""
    found, unfit = [], [name for name, m in model.named_modules() if isinstance(m, READ_BY_PARENT)]
    classes = {name: type(m).__name__ for name, m in model.named_modules()}
    for name, layer in model.named_modules():
        linear, conv = isinstance(layer, nn.Linear), isinstance(layer, CONVS) and layer.groups == 1
        if not name or not (linear or conv) or any(name.startswith(f"{other}." if other else "") for other in unfit):
            continue
        steps = name.split(".")
        around = [*steps, *(classes[".".join(steps[:i])] for i in range(len(steps)))]
        attention = any("attn" in word.lower() or "attention" in word.lower() for word in around)
        kinds = {"attention": attention, "linear": linear, "conv": conv}
        found += [name] if (kinds[target] if target in kinds else re.search(target, name)) else []
    return found


def explain_no_target(model: nn.Module, target: str) -> str:
    """Why no layer of `model` gets an adapter, and what could."""
    able = [name for kind in ("linear", "conv") for name in list_targets(model, kind)]
    shown = f"{', '.join(able[:5])}{' …' if len(able) > 5 else ''}" if able else "none"
    return (
        f"no layer that can have an adapter is '{target}' (attention, linear, conv, or a regular expression for names; such layers "
        f"of this model, the head among them: {shown})"
    )


@dataclass(frozen=True)
class Adapter:
    """The names of the two halves of an adapter: A (rank, in, *kernel) and B (out, rank, *ones); and of the change of its base."""

    a: str
    b: str

    @property
    def change(self) -> str:
        return self.a.replace("lora_A.weight", "change")


def list_adapters(names: Iterable[str]) -> list[Adapter]:
    """The adapters whose halves are among tensors' `names`: ours (LAYER.lora_A.weight) and peft's (LAYER.lora_A.default.weight)."""
    known = set(names)
    pairs = [Adapter(n, n.replace(".lora_A.", ".lora_B.")) for n in names if ".lora_A." in n and n.endswith("weight")]
    return [pair for pair in pairs if pair.b in known]


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """B A of an adapter as a matrix (out, in): of a convolution with the entries of its kernel along the last dim."""
    return b.flatten(1) @ a.flatten(1)
