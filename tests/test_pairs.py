"""Every extraction with every aggregation on real digits, and what a run's result may depend on."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load
from torch import nn

from hetfl import registry
from hetfl.aggregation.updates import Updates
from hetfl.config import resolve
from hetfl.errors import UsageError
from hetfl.hooks.manager import PluginManager
from hetfl.models import zoo
from hetfl.rounds.loop import Rounds
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import runner
from hetfl.runs.folder import RunFolder

EXTRACTIONS = [e.name for e in registry.builtins() if e.role == "extract"]

AGGREGATIONS = [e.name for e in registry.builtins() if e.role == "aggregate"]

SMALL = {"limit": 300, "clients": 4, "rounds": 2, "epochs": 1, "pretrain_steps": 5, "partition": "iid"}


def run(out, **values):
    """The final weights and the summary of a run."""
    folder = RunFolder(out).open()
    summary = runner.run(resolve({**SMALL, **values}), folder, NoCallback())
    return load((out / "weights.safetensors").read_bytes()), summary


def tuned(extract, aggregate, steps):
    """A pair with as many server steps a round, where its parts take any."""
    options = {
        ("extract", "fedconv"): {"steps": steps, "first_steps": steps},
        ("extract", "serveralone"): {"epochs": 1},
        ("extract", "dac"): {"epochs": 1, "stall": 0.3},
        ("extract", "lotteryfl"): {"threshold": 0.0},
        ("extract", "hermes"): {"threshold": 0.0},
        ("extract", "tailorfl"): {"steps": 2},
        ("aggregate", "kld"): {"steps": steps},
        ("aggregate", "fedmd"): {"public_epochs": 1, "distill_steps": 0},
    }
    chosen = {
        role: {name: options[role, name]}
        for role, name in (("extract", extract), ("aggregate", aggregate))
        if (role, name) in options
    }
    return {"extract": extract, "aggregate": aggregate, "set": chosen}


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


TINY = {
    "limit": 120,
    "pretrain_steps": 60,
    "clients": 3,
    "batch_size": 64,
    "rounds": 3,
    "model": "mlp",
    "model_args": {"hidden": [8, 6]},
    "levels": "1,0.5,0.5",
}


@pytest.mark.parametrize(("extract", "aggregate"), list(itertools.product(EXTRACTIONS, AGGREGATIONS)))
def test_any_pair_is_finite_deterministic_and_moves_only_what_is_covered(extract, aggregate, tmp_path, monkeypatch):
    moves, updates = [], []
    recover, whole = PluginManager.recover, Rounds.aggregate_train

    def recovered(self, *given):
        updates.extend(found := recover(self, *given))
        return found

    def watched(self, *given):
        updates.clear()
        before = self.server.state
        whole(self, *given)
        if updates:
            all_of_them = Updates(updates, before)
            covered = {name: all_of_them.column(name)[1].amax(0) > 0 for name in all_of_them.averaged()}
            moves.append({name: (self.server.state[name] != before[name], covered[name]) for name in covered})

    monkeypatch.setattr(PluginManager, "recover", recovered)
    monkeypatch.setattr(Rounds, "aggregate_train", watched)
    values = {**TINY, **tuned(extract, aggregate, 2)}
    one, summary = run(tmp_path / "1", workers=1, **values)
    monkeypatch.undo()
    two, again = run(tmp_path / "2", workers=2, **values)
    assert same(one, two)
    assert summary["accuracy"] == again["accuracy"]
    assert not any("left out" in note for note in summary["notes"])
    assert all(bool(torch.isfinite(t).all()) for t in one.values())
    assert not any(bool((moved & ~covered).any()) for round in moves for moved, covered in round.values())
    for round in moves:
        if any(bool(covered.any()) for _, covered in round.values()):
            assert any(bool(moved.any()) for moved, _ in round.values())
    assert bool(moves) == (extract != "serveralone")


def test_untuned_fedconv_and_kld_are_heterofl_and_overlap_exactly(tmp_path):
    """findings 6.6 and 0.2: with zero tuning steps they are HeteroFL's samples-weighted overlap mean."""
    ours, _ = run(tmp_path / "a", **tuned("fedconv", "kld", 0))
    theirs, _ = run(tmp_path / "b", extract="heterofl", aggregate="overlap", set={"overlap": {"weighting": "samples"}})
    assert same(ours, theirs)


def test_all_levels_one_and_weights_one_are_fedavg_exactly(tmp_path):
    """findings 6.6: all clients whole and w = 1 give FedAvg."""
    values = tuned("fedconv", "kld", 0)
    values["set"]["levels"] = {"mix": "1"}
    ours, _ = run(tmp_path / "a", **values)
    theirs, _ = run(tmp_path / "b", extract="full", aggregate="fedavg", levels="1")
    assert same(ours, theirs)


def test_the_seed_matters_and_the_partition_seed_is_apart(tmp_path):
    values = {"extract": "heterofl", "aggregate": "overlap", "rounds": 1}
    base, _ = run(tmp_path / "a", **values)
    assert not same(base, run(tmp_path / "b", seed=1, **values)[0])
    assert not same(base, run(tmp_path / "c", partition_seed=1, **values)[0])


def test_a_client_that_raises_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch):
    from hetfl.training import local as train

    whole = train.fit

    def fit(task):
        if task.client == 2:
            raise ValueError("sensor unplugged")
        return whole(task)

    monkeypatch.setattr(train, "fit", fit)
    _, summary = run(tmp_path / "a", extract="heterofl", aggregate="overlap", vmap="off")
    assert any("client 2 left out: ValueError: sensor unplugged" in note for note in summary["notes"])
    assert "sensor unplugged" in (tmp_path / "a" / "clients.csv").read_text()


@pytest.mark.parametrize("spoil", ["nan", "shape", "extra"])
def test_a_bad_reply_is_left_out(tmp_path, monkeypatch, spoil):
    from hetfl.training import local as train

    whole = train.fit

    def fit(task):
        reply = whole(task)
        name = next(iter(reply.state))
        if task.client == 1 and spoil == "nan":
            reply.state[name] = reply.state[name] * float("nan")
        if task.client == 1 and spoil == "shape":
            reply.state[name] = reply.state[name][:1]
        if task.client == 1 and spoil == "extra":
            reply.extras["surprise"] = torch.zeros(3)
        return reply

    monkeypatch.setattr(train, "fit", fit)
    weights, summary = run(tmp_path / "a", extract="heterofl", aggregate="overlap", vmap="off")
    assert sum("client 1 left out" in note for note in summary["notes"]) == 2
    assert all(bool(torch.isfinite(t).all()) for t in weights.values())


def test_no_valid_reply_leaves_the_global_model_untouched(tmp_path, monkeypatch):
    from hetfl.training import local as train

    def fit(task):
        raise RuntimeError("down")

    monkeypatch.setattr(train, "fit", fit)
    one, _ = run(tmp_path / "a", extract="heterofl", aggregate="overlap", vmap="off", rounds=1)
    two, _ = run(tmp_path / "b", extract="heterofl", aggregate="overlap", vmap="off", rounds=3)
    assert same(one, two)


def test_dropout_draws_from_the_clients_own_stream(tmp_path, monkeypatch):
    def net(classes, channels, size):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Dropout(0.5), nn.Linear(24, classes))

    monkeypatch.setitem(zoo.ZOO, "dropnet", net)
    values = {"extract": "heterofl", "aggregate": "overlap", "model": "dropnet"}
    one, _ = run(tmp_path / "1", workers=1, **values)
    torch.manual_seed(123)
    two, _ = run(tmp_path / "2", workers=2, **values)
    assert same(one, two)


@pytest.mark.parametrize("policy", ["static", "recalibrate"])
def test_statistics_policies(tmp_path, policy):
    """spec heterofl 2.4: statistics come from passes, not from the mean of what clients tracked."""
    values = {"extract": "heterofl", "aggregate": "overlap", "model": "cnn", "model_args": {"widths": [8, 8]}, "rounds": 1}
    mean, _ = run(tmp_path / "a", **values)
    other, _ = run(tmp_path / "b", norm_policy=policy, **values)
    assert not torch.equal(mean["1.running_var"], other["1.running_var"])
    assert torch.equal(mean["0.weight"], other["0.weight"])


NORMED = {"extract": "heterofl", "aggregate": "overlap", "model": "cnn", "model_args": {"widths": [8, 8]}, "rounds": 1}


def test_local_statistics_never_travel(tmp_path):
    weights, local = run(tmp_path / "a", norm_policy="local", **NORMED)
    _, all_of_it = run(tmp_path / "b", norm_policy="aggregate", **NORMED)
    _, again = run(tmp_path / "c", norm_policy="local", workers=1, **NORMED)
    assert local["bytes up"] < all_of_it["bytes up"]
    assert local["bytes down"] < all_of_it["bytes down"]
    assert local["accuracy"] == again["accuracy"]
    assert int(weights["1.num_batches_tracked"]) >= 0
    with pytest.raises(UsageError, match="--norm-policy local needs public data"):
        run(tmp_path / "d", norm_policy="local", server_data=0, **NORMED)


@pytest.mark.parametrize("policy", ["none", "instance", "layer", "group"])
def test_replacements_of_batch_norm(tmp_path, policy):
    """spec heterofl 2.4: none, IN (as many groups as channels), LN (1 group), GN (4 groups)"""
    weights, _ = run(tmp_path / "a", norm_policy=policy, **NORMED)
    assert not any("running" in name for name in weights)
    assert ("1.weight" in weights) == (policy != "none")
    assert all(bool(torch.isfinite(t).all()) for t in weights.values())


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_literal_presets_run(tmp_path, preset):
    options = {
        "fedconv": {"preset": preset, "epochs": 1, "dilator_epochs": 1},
        "kld": {"preset": preset, "epochs": 1},
    }
    weights, _ = run(tmp_path / "a", extract="fedconv", aggregate="kld", rounds=1, set=options)
    assert all(bool(torch.isfinite(t).all()) for t in weights.values())


def test_trained_dilators_run_and_differ(tmp_path):
    options = {"fedconv": {"steps": 2, "first_steps": 2, "dilator_steps": 10}}
    with_them, _ = run(tmp_path / "a", extract="fedconv", aggregate="overlap", rounds=1, set=options)
    options["fedconv"]["dilator_steps"] = 0
    without, _ = run(tmp_path / "b", extract="fedconv", aggregate="overlap", rounds=1, set=options)
    assert not same(with_them, without)


def test_an_undeclared_extra_on_the_way_down_is_refused(tmp_path, monkeypatch):
    from hetfl.errors import RunError

    monkeypatch.setattr("hetfl.hooks.manager.PluginManager.client_extras", lambda *_: {"secret": torch.zeros(2)})
    with pytest.raises(RunError, match="extra 'secret' is undeclared"):
        run(tmp_path / "a", extract="full", aggregate="fedavg")


@pytest.mark.parametrize("extract", EXTRACTIONS)
def test_clients_may_come_late_and_change_their_capacity(extract, tmp_path):
    values = {**TINY, **tuned(extract, None, 2), "fraction": 0.5, "rounds": 4, "levels": "1,0.5"}
    values["set"] = {**values["set"], "levels": {"redraw": True}}
    one, summary = run(tmp_path / "1", workers=1, **values)
    two, _ = run(tmp_path / "2", workers=2, **values)
    assert same(one, two)
    assert not any("left out" in note for note in summary["notes"])
    assert all(bool(torch.isfinite(t).all()) for t in one.values())
