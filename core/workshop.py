"""Submodels by their sizes: one module per worker thread and size, built once and loaded again and again."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping

import torch
from torch import nn

from hetfl.core.widths import State, Widths, build, load


class Workshop:
    """Builds the submodels of `model`. A module belongs to the thread that asked for it, until that thread asks again."""

    def __init__(self, model: nn.Module, widths: Widths) -> None:
        self.model, self.widths = model, widths
        self.full = {group.name: group.size for group in widths.groups}
        self._own = threading.local()

    def module(self, sizes: Mapping[str, int] | None = None) -> nn.Module:
        """The submodel that keeps `sizes` units of each group (None: the whole model), with values of any earlier use."""
        wanted = tuple((sizes or self.full).items())
        shelf = self._own.__dict__.setdefault("shelf", {})
        if wanted not in shelf:
            shelf[wanted] = self._build(dict(wanted))
        made: nn.Module = shelf[wanted]
        return made

    def _build(self, sizes: dict[str, int]) -> nn.Module:
        if sizes == self.full:
            return copy.deepcopy(self.model)
        kept = {name: torch.arange(size) for name, size in sizes.items()}
        return build(self.widths, self.model, kept)

    def loaded(self, state: State, sizes: Mapping[str, int] | None = None) -> nn.Module:
        """The submodel of `sizes` holding the values of `state`."""
        return load(self.module(sizes), state)
