"""splitmix beside other plugins, and with models that bring more than weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers.runs import STOPPABLE
from hetfl import Client, NotApplicable, Profile
from hetfl.config import resolve
from hetfl.plugins.methods.splitmix import SplitMix
from hetfl.testing.report import check_plugin
from hetfl.testing.subject import Subject


class Scaled(nn.Module):
    """A network whose channels are halved by a buffer outside its state."""

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(channels * size**2, 8), nn.Linear(8, classes)
        self.register_buffer("scale", torch.full((8,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.first(x.flatten(1))) * self.scale)
        return out


class Normed(nn.Module):
    """A network that normalises over its channels, with a head that begins at 0."""

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(channels * size**2, 8), nn.LayerNorm(8), nn.Linear(8, classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.norm(self.first(x.flatten(1)))))
        return out


class Gated(Normed):
    """A network whose norm over its channels lies behind a factor that begins at 0."""

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__(classes, channels, size)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x.flatten(1)))
        out: Tensor = self.head(h + self.gate * self.norm(h))
        return out


class Small(nn.Sequential):
    """One hidden layer."""

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__(nn.Flatten(), nn.Linear(channels * size**2, 8), nn.ReLU(), nn.Linear(8, classes))


class Double(Small):
    """A network of float64."""

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__(classes, channels, size)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x.double())
        return out


class FixedHead(Small):
    """A network of which the head stays as it is."""

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__(classes, channels, size)
        self[3].requires_grad_(False)


class Bag(nn.Module):
    """Words' mean, one hidden layer."""

    def __init__(self, classes: int, channels: int, size: int) -> None:
        super().__init__()
        self.words, self.first, self.head = nn.Embedding(17, 8), nn.Linear(8, 8), nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.first(self.words(x.flatten(1).clamp(0, 16).long()).mean(1))))
        return out


def answer_by_bases(made):
    """What the global model answers to two inputs, and the mean of what its bases do."""
    server, plugin = made.server, made.plugins.plugins["extract.splitmix"]
    plans = plugin._make_plans(server, [[base] for base in range(plugin.bases)])
    each = [server.logits(plan.take(server.state), server.example, plan.sizes) for plan in plans]
    return server.logits(server.state, server.example), torch.stack(each).mean(0)


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
        ({"model": f"{__name__}:Normed", "model_args": {}, "set": {"splitmix": {"bases": 2}}}, "no mean of bases"),
        (
            {"model": f"{__name__}:Gated", "model_args": {}, "set": {"splitmix": {"bases": 2}}, "pretrain_steps": 0},
            "no mean of bases",
        ),
        (
            {"model": f"{__name__}:FixedHead", "model_args": {}, "set": {"splitmix": {"bases": 2}}, "adapter": "own"},
            "3.weight is frozen",
        ),
        ({"set": {"splitmix": {"bases": 400}}}, "400 bases need as many units in all layers"),
        ({"server_finetune_steps": 3}, "joins the bases"),
    ],
)
def test_what_is_no_mean_of_bases_is_refused(simulate, values, why):
    with pytest.raises(NotApplicable, match=why):
        simulate(0, extract="splitmix", aggregate="overlap", **values)


def test_all_clients_of_a_net_with_batch_norm_train_and_it_answers_with_the_mean_of_its_bases(simulate):
    values = {"model": "cnn", "model_args": {"widths": [8, 8]}, "levels": "1,0.5,0.25"}
    made = simulate(2, extract="splitmix", aggregate="overlap", **values)
    assert not [row["fault"] for row in made.state.client_rows if "fault" in row]
    assert torch.allclose(*answer_by_bases(made), atol=1e-5)


@pytest.mark.parametrize("wrap", [["dp"], ["dp", "clip"]])
def test_noise_between_the_bases_does_not_join_them(simulate, wrap):
    pytest.importorskip("dp_accounting")
    values = {"levels": "1,0.5,0.25", "set": {"splitmix": {"bases": 2}, "dp": {"noise": 0.5}}}
    made = simulate(2, extract="splitmix", aggregate="overlap", wrap=wrap, **values)
    assert torch.allclose(*answer_by_bases(made), atol=1e-4)


def test_bases_are_taught_once_before_the_first_clients_whatever_the_round(simulate):
    made = simulate(0, extract="splitmix", aggregate="overlap", set={"splitmix": {"bases": 2, "first_steps": 40}})
    server, plugin, steps = made.server, made.plugins.plugins["extract.splitmix"], [made.server.steps]
    for round in (4, 5):
        plugin.extract(server, [Client(0, Profile(1.0))], round)
        steps.append(server.steps - steps[0])
    assert steps[1:] == [80, 80]


def test_a_run_that_goes_on_does_not_teach_its_bases_again(tmp_path, stops):
    values = {"extract": "splitmix", "aggregate": "overlap", "set": {"splitmix": {"bases": 2, "first_steps": 40}}}
    assert stops.changes_nothing(tmp_path, resolve({**STOPPABLE, **values}))


@pytest.mark.parametrize("model", ["Bag", "Double"])
def test_an_embedding_is_no_head_and_any_precision_will_do(simulate, model):
    made = simulate(
        2, extract="splitmix", aggregate="overlap", model=f"{__name__}:{model}", model_args={}, set={"splitmix": {"bases": 2}}
    )
    assert not [row["fault"] for row in made.state.client_rows if "fault" in row]
    assert torch.allclose(*answer_by_bases(made), atol=1e-5)


def test_its_state_is_all_in_its_state_dict():
    assert [r.status for r in check_plugin(Subject("extract", SplitMix), only=["state_round_trips"]).results] == ["passed"]
