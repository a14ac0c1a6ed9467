"""Strategies against the oracles of their papers, and what the base class promises to plugin authors."""

from __future__ import annotations

from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn

from hetfl.config import resolve
from hetfl.data.dataset import Examples
from hetfl.errors import UsageError
from hetfl.hooks.base import Plugin
from hetfl.hooks.hookspecs import hookimpl
from hetfl.hooks.loading import load_plugins
from hetfl.hooks.manager import PluginManager
from hetfl.models.normalization import measure_statistics
from hetfl.plugins.aggregations.kld import KLD
from hetfl.plugins.methods.fedconv.options import halve_rate
from hetfl.plugins.methods.fedconv.strategy import FedConv
from hetfl.plugins.methods.heterofl import mask_absent_classes, scale_activations
from hetfl.plugins.profiles.levels import Levels, expand_letters
from hetfl.profiling import capacity
from hetfl.rng import seed_of, stream
from hetfl.submodel import encoding
from hetfl.training.tuning import tune


def test_masked_cross_entropy():
    """spec heterofl 6.5"""
    z = torch.tensor([[2.0, 1.0, -1.0]], requires_grad=True)
    loss = mask_absent_classes(torch.tensor([True, False, True]))(z, torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.169846, abs=1e-6)
    assert z.grad[0, 1] == 0


def test_scaler_acts_in_training_only():
    """spec heterofl 6.6: s = .25, x = 1: train 4, eval 1"""
    seen = []

    class Probe(nn.LayerNorm):
        def forward(self, x):
            seen.append(x.flatten()[0].item())
            return x

    model = nn.Sequential(Probe(1))
    with scale_activations(model, 0.25):
        model.train()(torch.ones(1, 1))
        model.eval()(torch.ones(1, 1))
    model.train()(torch.ones(1, 1))
    assert seen == [4, 1, 1]


def test_scaler_without_norms_scales_hidden_outputs():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).train()
    nn.init.ones_(model[0].weight), nn.init.ones_(model[1].weight)
    with scale_activations(model, 0.5):
        assert model(torch.ones(1, 1)).item() == 2


def test_static_batch_norm_statistics():
    """spec heterofl 6.7: batches [0, 2] then [4, 8]: mean 3.5, var 5.0"""
    model = nn.Sequential(nn.BatchNorm1d(1))
    batches = [(torch.tensor([[0.0], [2.0]]), torch.zeros(2)), (torch.tensor([[4.0], [8.0]]), torch.zeros(2))]
    state, count = measure_statistics(model, batches)
    assert count == 2
    assert state["0.running_mean"].item() == 3.5
    assert state["0.running_var"].item() == 5.0
    assert model[0].momentum == 0.1


def test_fixed_levels():
    """spec heterofl 6.8"""

    def numbers(mix, clients):
        parts = capacity.mix(expand_letters(mix), capacity.ratio)
        dealt = capacity.deal(parts, clients)
        return [dealt.count(r) for r, _ in parts]

    assert numbers("1:2,0.5:8", 100) == [20, 80]
    assert numbers("1,0.5,0.25", 100) == [33, 33, 34]
    assert numbers("1:3,0.5:3,0.25:3", 10) == [3, 3, 4]
    assert numbers("1:0.5,0.25:0.5", 10) == [5, 5]
    assert capacity.mix("1:4,0.5:8", float) == [(1.0, Fraction(4)), (0.5, Fraction(8))]
    assert numbers("a2-b8", 100) == [20, 80]
    assert numbers("a1-b1-c1", 100) == [33, 33, 34]
    assert numbers("a3-b3-c3", 10) == [3, 3, 4]
    assert numbers("a6-b10-c11-d18-e55", 100) == [6, 10, 11, 18, 55]
    assert [r for r, _ in capacity.mix(expand_letters("a1-b1-c1-d1-e1"), capacity.ratio)] == [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16]
    assert numbers("0.75^k", 10) == [2, 4, 4]
    assert [r for r, _ in capacity.mix("0.75^0:2,0.75^1:4,0.75^2:4", capacity.ratio)] == [1, 0.75, 0.5625]


def test_redrawn_levels_change_and_repeat():
    from hetfl.profiling.node import Node

    levels = Levels(mix="1,0.5", redraw=True)
    drawn = [[levels.profile(Node(c, 8, r, 0)).width for c in range(8)] for r in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.parametrize("mix", ["0:1", "1.5", "a:1", "1:0", "1:-2", "", "nan"])
def test_levels_outside_their_range_are_refused(mix):
    with pytest.raises(ValueError, match=r"ratio|share"):
        Levels(mix=mix)


def test_learning_rate_by_round():
    """spec fedconv 6.7"""
    rounds = (1, 24, 25, 49, 50, 75, 100)
    assert [halve_rate(1e-3, r, 25) for r in rounds] == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 1.25e-4, 6.25e-5]


def test_presets_fill_what_is_not_given():
    assert FedConv(preset="reference").mlr == 2
    assert FedConv(preset="reference", mlr=0).mlr == 0
    assert KLD(preset="paper").form == "weights"
    assert KLD().shape == "channel"


def test_tuning_never_ends_worse_than_it_began_by_the_hold_out():
    """findings 6.5: step 0 is among the choices"""
    w = torch.zeros(1, requires_grad=True)
    data = Examples(torch.zeros(8, 1), torch.zeros(8, dtype=torch.long), torch.arange(8))
    wrong = tune(data, [w], lambda _: (w - 1).square().sum(), lambda: float(w.abs()), stream(0, "t"), steps=25, lr=0.1, batch=4)
    assert wrong.step == 0
    assert w.item() == 0
    towards = lambda: float((w - 1).abs())  # noqa: E731
    right = tune(data, [w], lambda _: (w - 1).square().sum(), towards, stream(0, "t"), steps=25, lr=0.1, batch=4)
    assert right.step > 0
    assert right.best < right.start


def test_an_option_may_not_bear_a_hooks_name():
    with pytest.raises(TypeError, match="bears a hook's name"):
        type("Bad", (Plugin,), {"__annotations__": {"extract": int}, "extract": 3, "__module__": __name__})


class Misspelt(Plugin):
    @hookimpl
    def aggregate(self, server, updatez):
        return None


def test_a_misspelt_hook_argument_is_refused():
    with pytest.raises(UsageError, match="updatez"):
        PluginManager({"aggregate.misspelt": Misspelt()})


def test_equal_options_are_two_plugins():
    assert Levels() != Levels()
    assert len({Levels(), Levels()}) == 2


class Outer(Plugin):
    log: list[str] = []

    @hookimpl(wrapper=True)
    def fit(self, task):
        task.append(type(self).__name__)
        return (yield)


class Inner(Outer):
    pass


class Core(Outer):
    pass


def test_wraps_stand_outside_in_and_the_extraction_innermost(monkeypatch):
    from hetfl.training import local as train

    monkeypatch.setattr(train, "fit", lambda task: task)
    roles = PluginManager({"extract.core": Core(), "wrap.outer": Outer(), "wrap.inner": Inner()})
    assert roles.fit([]) == ["Outer", "Inner", "Core"]


def test_ambiguous_and_foreign_options():
    with pytest.raises(UsageError, match="no chosen plugin is named 'fedconv'"):
        load_plugins(resolve({"extract": "heterofl", "set": {"fedconv": {"steps": 1}}}))
    roles = load_plugins(resolve({"extract": "heterofl", "set": {"extract": {"heterofl": {"scaler": True}}}}))
    assert roles.plugins["extract.heterofl"].scaler


def test_streams_are_named():
    assert seed_of(0, "a", 1, 2) == seed_of(0, "a", 1, 2)
    assert len({seed_of(s, p, r, c) for s in (0, 1) for p in "ab" for r in (0, 1) for c in (0, 1)}) == 16


def test_bytes_are_those_of_the_encoded_payload():
    state = {"w": torch.zeros(3, 4, 5), "b": torch.zeros(7), "seen": torch.tensor(3), "mask": torch.ones(9, dtype=torch.bool)}
    assert encoding.payload_bytes(state) == ArrayRecord(state).count_bytes()


def test_declared_extras_are_bounded():
    from hetfl.hooks.values import ExtraSpec

    assert ExtraSpec(4).admits(torch.zeros(4))
    assert not ExtraSpec(4).admits(torch.zeros(5))
    assert not ExtraSpec(4).admits(torch.zeros(4, dtype=torch.int64))


def test_a_run_without_public_data_says_so():
    from hetfl.hooks.server import Server

    server = object.__new__(Server)
    server._public = None
    with pytest.raises(UsageError, match="--server-data"):
        _ = server.public


def test_state_of_fedconv_and_kld_survives():
    kld = KLD()
    kld._w = {"0/w": torch.ones(2)}
    other = KLD()
    other.load_state_dict(kld.state_dict())
    assert torch.equal(other._w["0/w"], torch.ones(2))
    assert SimpleNamespace(**FedConv().model_dump()).steps == 20
