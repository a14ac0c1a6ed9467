"""The tensors of a model by name: read, copied, loaded, packed as bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, nn

from hetfl.errors import UsageError

State = dict[str, Tensor]  # by name


def named_tensors(model: nn.Module) -> State:
    """All parameters and buffers of `model` by name, tied ones under their first name: the very tensors."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def tensors(model: nn.Module) -> State:
    """Parameters and buffers by name, those in `state_dict` (tied ones under their first name); they share the model's memory."""
    kept = model.state_dict()
    return {name: tensor.detach() for name, tensor in named_tensors(model).items() if name in kept}


def apply_masks(state: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> State:
    """`state` with 0 where `masks` (bool, in the shapes of its tensors, of some of them) are False."""
    return {name: t * masks[name] if name in masks else t for name, t in state.items()}


Places = list[tuple[str, str]]


def call_with(model: nn.Module, state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """What `model` answers with the tensors `state` in place of its own, whose names are those of `tensors`."""
    return call_at(list_places(model), model, state, args, kwargs)


def call_at(places: Places, model: nn.Module, state: Mapping[str, Tensor], args: Sequence[Any], kwargs: Any = None) -> Any:
    """The same with the `places` of its tensors found before; they must still be right.

    A module that bears two names is given them once: torch's own tying gives and restores them twice, and so leaves it `state`'s.
    """
    given = {place: state[name] for place, name in places if name in state}
    return torch.func.functional_call(model, given, tuple(args), kwargs, tie_weights=False)


def list_places(model: nn.Module) -> Places:
    """Where tensors stand in the modules of `model`, each module under its first name, and what `tensors` names them."""
    first = {id(t): name for name, t in reversed([*model.named_parameters(), *model.named_buffers()])}
    return [
        (f"{path}.{name}" if path else name, first[id(t)])
        for path, module in model.named_modules()
        for name, t in {**module._parameters, **module._buffers}.items()
        if t is not None
    ]


def copy_state(model: nn.Module) -> State:
    """Copies of the tensors of `model`, contiguous, on its device."""
    return {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors(model).items()}


def move_state(state: Mapping[str, Tensor], device: torch.device | str) -> State:
    """The tensors on `device`: those that are there already are the same objects."""
    return {name: t.to(device) for name, t in state.items()}


def load_state(model: nn.Module, state: Mapping[str, Tensor], rest: Callable[[State], State] | None = None) -> nn.Module:
    """Copies `state` into the tensors of `model`, in place; those that it lacks are what `rest` answers, given the model's."""
    mine = tensors(model)
    if rest is not None and (lacking := {name: tensor for name, tensor in mine.items() if name not in state}):
        state = {**state, **rest(lacking)}
    with torch.no_grad():
        torch._foreach_copy_(list(mine.values()), [state[name] for name in mine])
    return model


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """`model` with the tensors of a .safetensors file, or of the run in a folder, in place.

    Raises UsageError where it cannot be read or has other tensors.
    """
    file = path / "weights.safetensors" if path.is_dir() else path
    try:
        found = safetensors.load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"the weights in '{file}' cannot be read: {error}") from error
    mine = tensors(model)
    if odd := sorted(found.keys() ^ mine.keys()):
        raise UsageError(f"the weights in '{file}' are of another model: it and they do not share {', '.join(odd[:3])}")
    for name, tensor in mine.items():
        if found[name].shape != tensor.shape:
            shapes = f"{tuple(found[name].shape)}, and that of the model {tuple(tensor.shape)}"
            raise UsageError(f"the weights in '{file}' are of another model: their '{name}' is {shapes}")
    return load_state(model, found)


def pack_tensors(state: State) -> bytes:
    """Tensors by name as the bytes of a safetensors file that keeps their order: tensor NAME at index i is `i:NAME`."""
    storages: set[int] = set()
    data: bytes = safetensors.save({f"{i}:{name}": to_own_storage(t, storages) for i, (name, t) in enumerate(state.items())})
    return data


def unpack_tensors(data: bytes) -> State:
    """The inverse of `pack_tensors`."""
    found = sorted(safetensors.load(data).items(), key=lambda item: int(item[0].split(":", 1)[0]))
    return {key.split(":", 1)[1]: tensor for key, tensor in found}


def to_own_storage(tensor: Tensor, storages: set[int]) -> Tensor:
    """The tensor in main memory, contiguous and in a storage that is none of `storages` (to which it is added), for safetensors."""
    dense = tensor.detach().cpu().contiguous()
    if dense.untyped_storage().nbytes() != dense.nbytes or dense.untyped_storage().data_ptr() in storages:
        dense = dense.clone()
    storages.add(dense.untyped_storage().data_ptr())
    return dense


def join_states(states: Mapping[str, State]) -> State:
    """Named groups of tensors as one: the tensor `name` of `group` becomes "group/name"."""
    return {f"{group}/{name}": tensor for group, state in states.items() for name, tensor in state.items()}


def split_states(joined: Mapping[str, Tensor]) -> dict[str, State]:
    """The inverse of `join_states`; group names have no slash."""
    found: dict[str, State] = {}
    for key, tensor in joined.items():
        group, name = key.split("/", 1)
        found.setdefault(group, {})[name] = tensor
    return found
