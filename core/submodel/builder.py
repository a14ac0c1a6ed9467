"""Submodels by their sizes: one module for each worker thread and size, built once and loaded again and again."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Mapping
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hetfl.models.frozen import base_hash, frozen, replacing
from hetfl.models.state import Places, State, call_at, list_places, load_state, tensors
from hetfl.submodel.blocks import take
from hetfl.submodel.depth import split_sizes
from hetfl.submodel.slicing import build_submodel
from hetfl.submodel.widths import Kept, Widths

CACHED = 16  # submodels that a thread keeps

Units = tuple[tuple[str, int], ...]  # the number of units of each group


class SubmodelBuilder:
    """Builds the submodels of `model`, and with `other` the architectures that clients have of their own, by name.

    `model` may be without values (on device "meta") where submodels are only loaded; `whole` then builds the one with values for
    `initial`. Modules are on `device`. `base` is what is frozen of `model` (models/frozen.py): all modules that leave a tensor of
    it whole have the same one, and so have those that cut it to one size. A module that `module` or `load` returns belongs to the
    calling thread, until that thread asks for the same sizes again.
    """

    def __init__(
        self,
        model: nn.Module,
        widths: Widths,
        other: Callable[[str], nn.Module] | None = None,
        device: str = "cpu",
        whole: Callable[[], nn.Module] | None = None,
    ) -> None:
        self.model, self.widths, self.device, self._other, self._whole = model, widths, device, other, whole
        self.full = {group.name: group.size for group in widths.groups}
        self._local, self._lock = threading.local(), threading.Lock()
        self._untrained: dict[str | None, nn.Module] = {None: model}
        with replacing(model, self._lay_out):
            pass
        self.base, self._cuts = frozen(model), dict[Units, State]()
        self._places: WeakKeyDictionary[nn.Module, Places] = WeakKeyDictionary()
        self._there: dict[int, tuple[Tensor, Tensor]] = {}  # frozen tensors on another device, beside those in main memory

    @cached_property
    def base_hash(self) -> str | None:
        """That of the frozen base, which never changes."""
        return base_hash(self.model)

    def module(self, sizes: Mapping[str, int] | None = None, model: str | None = None) -> nn.Module:
        """This thread's submodel of `sizes` units of each group (None: the whole model), with the values of its last use."""
        key = (model, () if model else tuple((self.full if sizes is None else sizes).items()))
        mine: dict[Hashable, nn.Module] = self._local.__dict__.setdefault("modules", {})
        found = mine.pop(key) if key in mine else self._place(self._make(dict(key[1]), model))
        mine[key] = found  # dicts keep the order of insertion: the first key is the least recently used
        if len(mine) > CACHED:
            del mine[next(iter(mine))]
        return found

    def _place(self, model: nn.Module) -> nn.Module:
        """`model` in the layout and on the device of the run; what is frozen of it is there once for all threads."""
        with replacing(model, self._move):
            return to_fast_layout(model).to(self.device)

    def _move(self, tensor: Tensor) -> Tensor:
        """A frozen tensor on the device of the run, the same one whenever it is asked for."""
        if torch.device(self.device).type == "cpu":
            return tensor
        with self._lock:
            if id(tensor) not in self._there:
                self._there[id(tensor)] = tensor, tensor.to(self.device)
            return self._there[id(tensor)][1]

    def _lay_out(self, tensor: Tensor) -> Tensor:
        """A frozen tensor in the layout that a module will have it in, so that none needs a copy."""
        form = fast_layout(self.model) if tensor.ndim == 4 else torch.contiguous_format
        return tensor.contiguous(memory_format=form)

    def _make(self, sizes: dict[str, int], name: str | None) -> nn.Module:
        model = self.untrained(name)
        if name or sizes == self.full:
            return materialize(copy.deepcopy(model, {id(t): t for t in self.base.values()}))
        groups, depth = split_sizes(sizes)
        kept = {name: torch.arange(size) for name, size in groups.items()}
        return materialize(build_submodel(self.widths, depth.cut(model), kept, self._cut_base(kept)))

    def _cut_base(self, kept: Kept) -> State:
        """The frozen tensors of a submodel of the leading units `kept`: the very same ones for all that ask."""
        if not self.base:
            return {}
        key = tuple((name, len(units)) for name, units in kept.items())
        with self._lock:
            if key not in self._cuts:
                while len(self._cuts) >= CACHED:
                    for name, tensor in self._cuts.pop(next(iter(self._cuts))).items():
                        if tensor is not self.base[name]:
                            self._there.pop(id(tensor), None)
                index = self.widths.cuts(kept)
                blocks = ((name, t, take(t, index.get(name, {}))) for name, t in self.base.items())
                self._cuts[key] = {name: t if small.shape == t.shape else self._lay_out(small.clone()) for name, t, small in blocks}
            return self._cuts[key]

    def build(self, sizes: Mapping[str, int] | None = None, model: str | None = None) -> nn.Module:
        """Builds a new submodel of `sizes` (None: the whole model) that nobody else has, with the values from before training."""
        return self._make(dict(self.full if sizes is None else sizes), model)

    def untrained(self, name: str | None = None) -> nn.Module:
        """The run's model, or the architecture `name`, as it was before training; it must not be changed."""
        with self._lock:
            if name not in self._untrained:
                assert name is not None
                assert self._other is not None
                self._untrained[name] = self._other(name)
            return self._untrained[name]

    def initial(self, sizes: Mapping[str, int] | None = None, model: str | None = None) -> State:
        """The tensors of a submodel before training: the leading entries of the run's model.

        Where that has no values, `whole` builds it, once: nodes need it only for clients that keep layers of their own.
        """
        if self._whole is not None:
            with self._lock:
                self.model, self._whole = self._whole(), None
                self._untrained[None] = self.model
        return tensors(self.untrained(model) if model else self.build(sizes))

    def load(self, state: State, sizes: Mapping[str, int] | None = None, model: str | None = None) -> nn.Module:
        """This thread's submodel of `sizes` with the values of `state`."""
        return load_state(self.module(sizes, model), state)

    def _find_places(self, model: nn.Module) -> Places:
        """Where the tensors of a module of this builder's stand, found once."""
        if model not in self._places:
            self._places[model] = list_places(model)
        return self._places[model]

    def logits(self, state: Mapping[str, Tensor], x: Tensor, sizes: Mapping[str, int] | None = None) -> Tensor:
        """f(x; state) of the submodel of `sizes` in evaluation mode, differentiable in `state`, its tensors."""
        model = self.module(sizes).eval()
        form, weights = fast_layout(model), {name: t.to(x.device) for name, t in state.items()}
        if form != torch.contiguous_format:
            weights |= {name: t.clone(memory_format=form) for name, t in weights.items() if t.ndim == 4}
        out: Tensor = call_at(self._find_places(model), model, weights, (x,))
        return out


def to_fast_layout(model: nn.Module) -> nn.Module:
    """Puts `model` in the memory layout that its layers are fastest in."""
    moved: nn.Module = model.to(memory_format=fast_layout(model))  # type: ignore[call-overload]
    return moved


def fast_layout(model: nn.Module) -> torch.memory_format:
    """The fastest layout by a fixed rule: channels last where a model pools or filters channel by channel, 0.5 to 0.9 of the time
    on CPU; plain residual nets are faster contiguous."""
    pools = any(isinstance(m, nn.MaxPool2d | nn.AvgPool2d) or (isinstance(m, nn.Conv2d) and m.groups > 1) for m in model.modules())
    return torch.channels_last if pools else torch.contiguous_format


def is_fully_named(model: nn.Module) -> bool:
    """Whether all tensors of `model` are in its state dict, so that one built without values can be completed by loading."""
    named = model.state_dict().keys()
    hidden = any(isinstance(v, Tensor) for m in model.modules() for v in vars(m).values())
    return not hidden and all(name in named for name, _ in model.named_buffers())


def materialize(model: nn.Module) -> nn.Module:
    """`model` with zeros for its tensors where they are without values (on device "meta"); else as it is."""
    if not any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        return model
    filled = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*filled.parameters(), *filled.buffers()):
            tensor.zero_()
    return filled
