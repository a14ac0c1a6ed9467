"""splitmix beside other plugins, and with models that bring more than weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hetfl import NotApplicable


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


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"model": "cnn", "model_args": {"widths": [8, 8]}, "norm_policy": "layer"}, "no mean of bases"),
        ({"set": {"splitmix": {"bases": 400}}}, "400 bases need as many units in every layer"),
        ({"server_finetune_steps": 3}, "would join the bases"),
    ],
)
def test_what_is_no_mean_of_bases_is_refused(simulate, values, why):
    with pytest.raises(NotApplicable, match=why):
        simulate(0, extract="splitmix", aggregate="overlap", **values)


def test_all_clients_of_a_net_with_batch_norm_train_and_it_answers_with_the_mean_of_its_bases(simulate):
    values = {"model": "cnn", "model_args": {"widths": [8, 8]}, "levels": "1,0.5,0.25"}
    made = simulate(2, extract="splitmix", aggregate="overlap", **values)
    assert not [row["fault"] for row in made.state.client_rows if "fault" in row]
    server, plugin = made.server, made.plugins.plugins["extract.splitmix"]
    plans = [plugin._plan(server, [base]) for base in range(4)]
    each = [server.logits(plan.take(server.state), server.example, plan.sizes) for plan in plans]
    assert torch.allclose(server.logits(server.state, server.example), torch.stack(each).mean(0), atol=1e-5)
