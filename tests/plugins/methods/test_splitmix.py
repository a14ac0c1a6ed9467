"""splitmix beside other plugins, and with models that bring more than weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Scaled(nn.Module):
    """A network whose channels are halved by a buffer outside its state."""

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(channels * size**2, 8), nn.Linear(8, classes)
        self.register_buffer("scale", torch.full((8,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.first(x.flatten(1))) * self.scale)
        return out


def test_clients_of_several_bases_train_with_the_masked_loss(simulate):
    made = simulate(1, extract="splitmix", aggregate="overlap", wrap=["maskloss"], set={"splitmix": {"bases": 2}})
    assert not [row["fault"] for row in made.state.client_rows if "fault" in row]


def test_a_buffer_outside_the_state_may_lie_along_channels(simulate):
    model = f"{__name__}:Scaled"
    made = simulate(1, extract="splitmix", aggregate="overlap", model=model, model_args={}, set={"splitmix": {"bases": 2}})
    assert not [row["fault"] for row in made.state.client_rows if "fault" in row]
