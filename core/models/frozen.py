"""The frozen base of a model: parameters that are not trained belong to the architecture, as what it computes of its sizes does.

They are no part of a model's state, so they are neither sent nor counted as sent, averaged, checkpointed or copied: every submodel
that leaves such a tensor whole has the very same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hetfl.digest import digest_tensors
from hetfl.errors import UsageError
from hetfl.models.casting import LOW, Casting, can_cast, casting_class
from hetfl.models.state import State

MARK = "frozen_names"  # of a module: the names of its own parameters that became part of the architecture


def freeze(model: nn.Module, low: bool = False) -> nn.Module:
    """Makes the parameters of `model` that need no gradient buffers outside its state dict, in place; tied ones stay tied.

    With `low` they are held in bfloat16, and cast to float32 when they are used (models/casting.py); the largest are cast last,
    when what the others took is free.
    """
    made: dict[tuple[int, bool], Tensor] = {}
    for module in sorted(model.modules(), key=lambda m: max((p.nbytes for p in m.parameters(recurse=False)), default=0)):
        names = [name for name, p in module._parameters.items() if p is not None and not p.requires_grad]
        for name in names:
            parameter = module._parameters.pop(name)
            assert parameter is not None
            lowers = low and can_cast(module) and parameter.dtype == torch.float32
            key = id(parameter), lowers
            if key not in made:
                made[key] = parameter.detach().to(LOW) if lowers else parameter.detach()
            module.register_buffer(name, made[key], persistent=False)
            if lowers and not isinstance(module, Casting):
                module.__class__ = casting_class(type(module))  # type: ignore[arg-type]
        if names:
            setattr(module, MARK, (*getattr(module, MARK, ()), *names))
            renew_recurrent(module)
    return model


def round_base(model: nn.Module) -> nn.Module:
    """Rounds what `freeze` would hold in bfloat16 to its values, in place: the model then computes what the frozen one does."""
    with torch.no_grad():
        for module in filter(can_cast, model.modules()):
            for parameter in module._parameters.values():
                if parameter is not None and not parameter.requires_grad and parameter.dtype == torch.float32:
                    parameter.copy_(parameter.to(LOW))
    return model


def renew_recurrent(module: nn.Module) -> None:
    """Has a recurrent layer compute with the tensors that it has now: it keeps a list of them beside."""
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def frozen(model: nn.Module) -> State:
    """The tensors that `freeze` took out of the state of `model`, by name; they share the model's memory."""
    marked = {f"{path}.{n}" if path else n for path, module in model.named_modules() for n in getattr(module, MARK, ())}
    return {name: tensor for name, tensor in model.named_buffers() if name in marked} if marked else {}


@contextmanager
def replacing(model: nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block `model` has no frozen tensors, so that nothing moves or casts them; after it, `change(tensor)` of each."""
    places = [(module, name) for module in model.modules() for name in getattr(module, MARK, ())]
    before = [module._buffers[name] for module, name in places]
    for module, name in places:
        module._buffers[name] = None
    made = {id(tensor): tensor for tensor in before if tensor is not None}
    try:
        yield
        made = {key: change(tensor) for key, tensor in made.items()}
    finally:
        for (module, name), tensor in zip(places, before, strict=True):
            module._buffers[name] = made[id(tensor)]
            renew_recurrent(module)


def base_hash(model: nn.Module) -> str | None:
    """The SHA-256 of what is frozen of `model`, names, types and values; None where nothing is."""
    base = frozen(model)
    return digest_tensors({name: tensor.cpu() for name, tensor in base.items()}) if base else None


def refuse_other_base(found: str | None, wanted: str | None) -> None:
    """Raises UsageError where the frozen base of a node's model has another hash than that of the run."""
    if found != wanted:
        raise UsageError("the frozen base of this node's model is not that of the run: it needs the same weights (--base)")
