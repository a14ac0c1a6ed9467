"""One bit an entry: the signs of what a client changed, and a magnitude for each tensor (Karimireddy et al., ICML 2019)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Generator, Tensor

from hetfl import Field, State
from hetfl.plugins.wrappers.codec import TensorCodec
from hetfl.submodel.encoding import pack_bits, unpack_bits


class Sign(TensorCodec):
    """Sends the sign of every entry of a client's update, and the mean magnitude of each tensor (EF-signSGD)."""

    PARTS: ClassVar[tuple[str, ...]] = ("size", "number")

    feedback: bool = Field(True, description="what the signs lose in a round is added to the client's next update")

    def compress(self, values: Tensor, generator: Generator) -> State:
        flat = values.flatten()
        return {"": pack_bits(flat >= 0), "size": flat.abs().mean(), "number": torch.tensor(len(flat), dtype=torch.int32)}

    def restore(self, parts: State, size: int) -> Tensor:
        bits, number = parts[""], int(parts["number"])
        if bits.dtype != torch.uint8 or bits.shape != (-(-number // 8),) or number < 0:
            raise ValueError(f"{tuple(bits.shape)} bytes of signs for {number} entries")
        return torch.where(unpack_bits(bits, (number,)), parts["size"], -parts["size"])
