"""A frozen base that is held in bfloat16: its layers compute in float32, with its tensors cast up when they are used and no longer.

Without gradients of its own such a tensor is needed again in the backward pass alone, for which its bfloat16 values are kept.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

LOW = torch.bfloat16

ALIVE = "_cast"  # attribute of a module in its forward pass: the tensors that it has cast

RECURRENT = (nn.RNNBase, nn.RNNCellBase)  # which keep a list of their tensors beside


class Casting:
    """Comes before a module's class `casts`: its low buffers are read in float32."""

    casts: ClassVar[type[nn.Module]]

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)  # type: ignore[misc]
        if not (isinstance(found, Tensor) and found.dtype == LOW and name in self.__dict__["_buffers"]):
            return found
        cast = found.float()
        if (alive := self.__dict__.get(ALIVE)) is not None:
            alive[cast.untyped_storage().data_ptr()] = cast, found
        return cast

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, of whose cast tensors autograd keeps the low values."""
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        alive = dict[int, tuple[Tensor, Tensor]]()  # by where they lie: as long as they are here, nothing else can lie there
        before = self.__dict__.get(ALIVE)

        def pack(tensor: Tensor) -> Any:
            _, low = alive.get(tensor.untyped_storage().data_ptr(), (None, None))
            return tensor.detach() if low is None else (low, tensor.size(), tensor.stride(), tensor.storage_offset())

        self.__dict__[ALIVE] = alive
        try:
            with saved_tensors_hooks(pack, unpack):
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.__dict__[ALIVE] = before
            alive.clear()  # the graph keeps `pack`

    def __reduce__(self) -> Any:
        return make_casting, (self.casts,), {**self.__dict__, ALIVE: None}


def unpack(kept: Any) -> Tensor:
    """What the backward pass needs, of what the forward pass kept."""
    if isinstance(kept, Tensor):
        return kept
    low, *place = kept
    found: Tensor = low.float().as_strided(*place)
    return found


class CastingLookup(Casting):
    """An embedding, of which no more than the rows that are looked up is cast."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.__dict__["_buffers"]["weight"]).float()


@functools.cache
def casting_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of the modules of `kind` that cast."""
    first = CastingLookup if kind.forward is nn.Embedding.forward else Casting
    return type(kind.__name__, (first, kind), {"__module__": kind.__module__, "casts": kind})


def make_casting(kind: type[nn.Module]) -> nn.Module:
    """A module of `kind` that casts, without contents: for copy and pickle."""
    made = casting_class(kind)  # type: ignore[arg-type]
    return made.__new__(made)


def can_cast(module: nn.Module) -> bool:
    """Whether tensors of this module can be held low; recurrent layers read a list of them that they keep beside."""
    return not isinstance(module, RECURRENT) and not (isinstance(module, nn.Embedding) and module.max_norm is not None)


def is_low(model: nn.Module) -> bool:
    """Whether a module of `model` casts."""
    return any(isinstance(module, Casting) for module in model.modules())
