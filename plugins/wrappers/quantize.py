"""Quantised updates: what a client changed travels in 8 or 16 bits an entry (QSGD, Alistarh et al., NeurIPS 2017)."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from hetfl import Field, NotApplicable, Server, State, hookimpl
from hetfl.plugins.wrappers.codec import SMALL, TensorCodec, join


class Quantize(TensorCodec):
    """Rounds a client's update at random to whole steps, so that its expectation is the update; each block has steps of its own."""

    PARTS: ClassVar[tuple[str, ...]] = ("step",)

    bits: Literal[8, 16] = Field(8, description="bits of an entry")
    block: int = Field(256, ge=1, description="entries that share a step: the largest of them is 127 steps (32767 with 16 bits)")

    down: bool = Field(False, description="what clients are sent is quantised too")

    @property
    def inactive_hooks(self) -> Collection[str]:
        return (*super().inactive_hooks, *(() if self.down else ("encode_down", "decode_down")))

    @hookimpl
    def encode_down(self, server: Server, state: State, round: int) -> State:
        encoded, generator = dict(state), server.stream("Quantize down", round)
        for name, t in state.items():
            if t.dtype == torch.float32 and t.numel() > SMALL:
                encoded |= {join(name, part): p for part, p in self.compress(t, generator).items()}
        return encoded

    @hookimpl
    def decode_down(self, encoded: State, like: State) -> State:
        if name := next((name for name in like if name not in encoded), None):
            raise NotApplicable(
                f"not applicable: another plugin sends '{name}' down in a form of its own, which quantize cannot round (down=false)"
            )
        return self.decode(encoded, like)

    def compress(self, values: Tensor, generator: Generator) -> State:
        most, flat = 2 ** (self.bits - 1) - 1, values.flatten().double()
        blocks = F.pad(flat, (0, -len(flat) % self.block)).view(-1, self.block)
        step = torch.nextafter((blocks.abs().amax(1) / most).float(), torch.tensor(torch.inf))  # never above `most` steps
        drawn = torch.rand(blocks.shape, generator=generator, dtype=torch.float64)
        codes = (blocks / step.double()[:, None] + drawn).floor().flatten()[: len(flat)]
        return {"": codes.to(torch.int8 if self.bits == 8 else torch.int16), "step": step}

    def restore(self, parts: State, size: int) -> Tensor:
        codes, step = parts[""], parts["step"]
        if codes.ndim != 1 or step.shape != (-(-len(codes) // self.block),):
            raise ValueError(f"{tuple(codes.shape)} codes with {tuple(step.shape)} steps for blocks of {self.block}")
        return codes.float() * step.repeat_interleave(self.block)[: len(codes)]
