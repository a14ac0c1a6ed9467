"""The tensors of a model by name: read, copied, loaded, packed as bytes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn


def pack_tensors(group: State) -> bytes:
    """Tensors and the order they stand in."""
    storages: set[int] = set()
    found: bytes = safetensors.save({f"{i}:{name}": own_storage(t, storages) for i, (name, t) in enumerate(group.items())})
    return found


def unpack_tensors(data: bytes) -> State:
    """The inverse of `packed`."""
    found = sorted(safetensors.load(data).items(), key=lambda item: int(item[0].split(":", 1)[0]))
    return {key.split(":", 1)[1]: tensor for key, tensor in found}


def own_storage(tensor: Tensor, storages: set[int]) -> Tensor:
    """The tensor in main memory, in plain layout and in a storage that is none of `storages`, as safetensors wants it."""
    plain = tensor.detach().cpu().contiguous()
    if plain.untyped_storage().nbytes() != plain.nbytes or plain.untyped_storage().data_ptr() in storages:
        plain = plain.clone()
    storages.add(plain.untyped_storage().data_ptr())
    return plain


State = dict[str, Tensor]


def tensors(model: nn.Module) -> State:
    """Parameters and buffers by name, those of `state_dict` (tied ones under their first name)."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = model.state_dict()
    return {name: tensor.detach() for name, tensor in named.items() if name in kept}


def copy_state(model: nn.Module) -> State:
    """The tensors of `model` as they are now, in main memory and the plain layout whatever the model's."""
    return {name: torch.empty(t.shape, dtype=t.dtype).copy_(t) for name, t in tensors(model).items()}


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Copies `state` into the tensors of `model`, in place."""
    mine = tensors(model)
    with torch.no_grad():
        torch._foreach_copy_(list(mine.values()), [state[name] for name in mine])
    return model


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
