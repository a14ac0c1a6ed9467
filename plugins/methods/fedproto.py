"""FedProto (Tan et al., AAAI 2022): the mean over clients of the mean features of each class is what all pull their features to."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from hetfl import Field, Server
from hetfl.plugins.methods.prototypes import Prototypes


class FedProto(Prototypes):
    """A global prototype is the weighted mean of the clients' prototypes of its class; one that nobody sends stays."""

    weighting: Literal["samples", "uniform"] = Field(
        "samples", description="a client's prototype counts its examples of the class, or 1 (the official code)"
    )

    def merge(self, server: Server, prototypes: Tensor, counts: Tensor, round: int) -> tuple[Tensor, Tensor]:
        votes = (counts if self.weighting == "samples" else counts > 0).float()
        mean = (votes[:, :, None] * prototypes).sum(0) / votes.sum(0).clamp(min=1)[:, None]
        seen = votes.sum(0) > 0
        return self._known | seen, torch.where(seen[:, None], mean, self._prototypes)
