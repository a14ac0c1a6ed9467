"""The head of any model, and the features before it: what the layer that makes the logits is given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hetfl.errors import NotApplicable
from hetfl.models.early_exit import all_exits, has_parameters
from hetfl.models.watching import run_watched


def find_heads(model: nn.Module, x: Tensor, answer: tuple[int, ...]) -> list[str]:
    """The names of the layers with parameters of their own that answer x (N, *shape) with (N, *answer), in the order of the pass.

    Of a model with several exits, those before its deepest one alone.
    """
    found: list[str] = []
    layers = {name: m for name, m in model.named_modules() if name and has_parameters(m)}

    def watch(name: str) -> Any:
        def note(_: nn.Module, given: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.shape == (len(x), *answer):
                found.append(name)

        return note

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    modes = [(m, m.training) for m in model.modules()]
    try:
        with all_exits(model, every=False):
            run_watched(model, x, hooks)
    finally:
        for module, training in modes:
            module.training = training
    return found


def find_head(model: nn.Module, x: Tensor, classes: int) -> str:
    """The name of the layer that makes the logits, the last of `find_heads`. Raises NotApplicable where there is none."""
    if heads := find_heads(model, x, (classes,)):
        return heads[-1]
    raise NotApplicable(
        f"not applicable: no layer of this {type(model).__name__} with parameters of its own answers with a number for each class, "
        "so there are no features before it"
    )


class Features:
    """`last`: what the head was given in the last forward pass, (N, features); empty before any."""

    def __init__(self) -> None:
        self.last = Tensor()


@contextmanager
def watching_features(models: Iterable[nn.Module], head: str) -> Iterator[Features]:
    """Within the block the answer holds the features before the layer `head` of whichever of `models` ran last; those without such
    a layer do not count. Gradients pass through them."""
    seen = Features()

    def note(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.last = next(iter((*given, *named.values()))).flatten(1)

    layers = [layer for model in models for name, layer in model.named_modules() if name == head]
    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
