"""Sparse uploads: the largest entries of what a client changed (Aji & Heafield, EMNLP 2017; Stich et al., NeurIPS 2018)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from hetfl import Field, State
from hetfl.plugins.wrappers.codec import TensorCodec


class TopK(TensorCodec):
    """Sends the entries of largest magnitude of each tensor's update, and where they are; the rest waits for a later round."""

    PARTS: ClassVar[tuple[str, ...]] = ("at",)

    share: float = Field(0.1, gt=0, le=1, description="share of each tensor's entries that is sent")
    feedback: bool = Field(True, description="what is not sent in a round is added to the client's next update")

    def compress(self, values: Tensor, generator: Generator) -> State:
        flat = values.flatten()
        at = flat.abs().topk(max(1, round(self.share * len(flat)))).indices.sort().values
        return {"": flat[at], "at": at.to(torch.int16 if len(flat) <= 2**15 else torch.int32)}

    def restore(self, parts: State, size: int) -> Tensor:
        values, at = parts[""], parts["at"].long()
        ascending = at.ndim == 1 and bool((at.diff() > 0).all()) and bool(((at >= 0) & (at < size)).all())
        if not ascending or values.shape != at.shape:
            raise ValueError(f"{tuple(values.shape)} values at {tuple(at.shape)} positions of {size}")
        return torch.zeros(size).index_copy_(0, at, values)
