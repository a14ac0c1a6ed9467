"""FedConv's rounds: rates, presets, tuning of filters and dilators."""

from __future__ import annotations

import csv
from types import SimpleNamespace

import pytest
import torch

from helpers.runs import run
from helpers.states import same
from hetfl.config import resolve
from hetfl.data.kinds import CLASSIFY
from hetfl.plugins.aggregations.kld import KLD
from hetfl.plugins.methods.fedconv.filters import Filters
from hetfl.plugins.methods.fedconv.strategy import FedConv
from hetfl.plugins.methods.fedconv.tiling import tile_parameters
from hetfl.plugins.methods.fedconv.tuning import make_global_goals, train_compressor
from hetfl.presets import find_preset
from hetfl.rounds.loop import run_round, run_rounds
from hetfl.rounds.reporting import NoCallback
from hetfl.runs.experiment import prepare
from hetfl.submodel.widths import prefix
from hetfl.training.tuning import halve_rate


def test_learning_rate_by_round():
    """spec fedconv 6.7"""
    rounds = (1, 24, 25, 49, 50, 75, 100)
    assert [halve_rate(1e-3, r, 25) for r in rounds] == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 1.25e-4, 6.25e-5]


def test_presets_fill_what_is_not_given():
    assert FedConv(preset="reference").mlr == 2
    assert FedConv(preset="reference", mlr=0).mlr == 0
    assert KLD(preset="paper").form == "weights"
    assert KLD().shape == "channel"


def test_frozen_parameters_are_sliced_and_not_weighed(simulate):
    """spec fedconv 2.2, 2.6: batch norm's frozen affine part (1, 0) of the HAR net has no filters and no weights of its own"""
    options = {"fedconv": {"start": "random", "steps": 5, "first_steps": 5, "dilate": "weights", "mlr": 1},
               "kld": {"form": "weights", "start": "normal", "guard": False, "steps": 5}}  # fmt: skip
    made = simulate(1, extract="fedconv", aggregate="kld", model="fedconv-har", model_args={}, set=options)
    sent = made.plugins.extract(made.server, list(made.server.clients.values()), 2)[1].take(made.server.state)
    for state in (sent, made.server.state):
        assert all(bool((state[f"{layer}.weight"] == 1).all()) and not state[f"{layer}.bias"].any() for layer in (1, 4))


def test_reference_runs_take_the_steps_of_the_code():
    """spec fedconv 1, 3: ten epochs of fine-tuning before each round in place of pre-training, no clipping, nothing stops early"""
    for dataset in ("mnist", "cifar10", "cinic10", "harbox"):
        values = find_preset(f"fedconv/{dataset}-reference").values
        assert (values["pretrain_steps"], values["clip"], values["alpha"], values["epochs"]) == (0, 0, 10000.0, 5)
        fedconv, kld = FedConv(**values["set"]["fedconv"]), KLD(**values["set"]["kld"])
        assert (fedconv.server_epochs, fedconv.upload_epochs, fedconv.patience, fedconv.halve_every) == (10, 10, 0, 25)
        assert (kld.halve_every, kld.kld, kld.shape, kld.start) == (25, 0.0, "element", "normal")


@pytest.mark.parametrize(("objective", "dilate"), [("distill", "update"), ("ce", "weights")])
def test_dilators_tuned_as_one_batch_are_those_tuned_alone(monkeypatch, objective, dilate):
    """Early stopping included: what one client's tuning comes to does not depend on who is beside it."""
    from hetfl.plugins.methods.fedconv import tuning as fedconv

    tuning = {"steps": 2, "first_steps": 2, "start": "random", "dilator_steps": 40, "patience": 1, "dilator_lr": 0.01}
    options = resolve({
        "dataset": "digits", "limit": 300, "clients": 4, "rounds": 1, "pretrain_steps": 5, "levels": "0.5:1", "control": False,
        "lr": 0.3, "aggregate": "overlap", "set": {"fedconv": {"objective": objective, "dilate": dilate, **tuning}},
    })  # fmt: skip
    found = []
    for most in (1, 16):
        monkeypatch.setattr(fedconv, "TOGETHER", most)
        made = prepare(options, NoCallback())
        run_rounds(made.state, made.engine)
        made.server.pool.close()
        found.append((made.server.state, (made.server.steps_saved, made.server.epochs_saved)))
    (alone, spared), (together, spared_together) = found
    assert spared == spared_together
    assert objective != "ce" or spared[0] > 0
    x = made.federation.test.all()[0]
    said = [made.server.predict(state, x).log_softmax(1) for state in (alone, together)]  # a shift of all logits is free
    assert torch.allclose(*said, atol=1e-3)


@pytest.mark.parametrize(("preset", "steps"), [("paper", 3 + 3 + 1), ("reference", 3 + 3 + 1 + 10 + 4 * 10)])
def test_literal_presets_take_the_steps_of_the_code(tmp_path, preset, steps):
    """spec fedconv 1, 3: an epoch for three compressors, three dilators and the weights; the code's ten for the global model before
    the round and for each of four uploads"""
    options = {
        "fedconv": {"preset": preset, "epochs": 1, "dilator_epochs": 1},
        "kld": {"preset": preset, "epochs": 1},
    }
    weights, _ = run(tmp_path / "a", extract="fedconv", aggregate="kld", rounds=1, set=options)
    assert all(bool(torch.isfinite(t).all()) for t in weights.values())
    with open(tmp_path / "a" / "metrics.csv") as file:
        assert [int(row["server steps"]) for row in csv.DictReader(file)] == [steps]


def test_trained_dilators_run_and_differ(tmp_path):
    options = {"fedconv": {"steps": 2, "first_steps": 2, "dilator_steps": 10}}
    with_them, _ = run(tmp_path / "a", extract="fedconv", aggregate="overlap", rounds=1, set=options)
    options["fedconv"]["dilator_steps"] = 0
    without, _ = run(tmp_path / "b", extract="fedconv", aggregate="overlap", rounds=1, set=options)
    assert not same(with_them, without)


def test_compressors_stop_early_and_are_judged_by_the_held_out_examples(simulate, monkeypatch):
    tuning = {"steps": 60, "first_steps": 60, "lr": 0.5}
    saved = [simulate(1, extract="fedconv", aggregate="overlap", set={"fedconv": {**tuning, "patience": p}}).server.steps_saved
             for p in (0, 1)]  # fmt: skip
    assert saved[0] == 0 < saved[1]
    made, judged = simulate(0, extract="fedconv", aggregate="overlap", server_data=0.3), []

    def tune(weights, loss, judge, *rest, **options):
        with torch.no_grad():
            judged.append(judge())
        return SimpleNamespace(step=0)

    monkeypatch.setattr(made.server, "tune", tune)
    options, half = FedConv(), made.server.select(prefix(0.5))
    filters = Filters(half, tile_parameters(half, made.server.state, ["1.weight", "3.weight", "5.weight"]))
    train_compressor(options, made.server, filters, make_global_goals(options, made.server), "0.5", 1)

    def distance(x):
        small, whole = made.server.logits(half.take(made.server.state), x, half.sizes), made.server.logits(made.server.state, x)
        return float(options.loss(CLASSIFY, small, whole))

    tune_x, held_x = made.server.public.tune.all()[0], made.server.public.holdout.all()[0]
    assert judged == pytest.approx([distance(held_x)], rel=1e-4)
    assert judged != pytest.approx([distance(tune_x)], rel=1e-3)


def test_a_client_of_another_width_gets_another_dilator(simulate):
    options = {"fedconv": {"steps": 1, "first_steps": 1, "dilator_steps": 1}}
    made = simulate(0, extract="fedconv", aggregate="overlap", clients=2, levels="0.5,0.25", set=options)
    for number, mix, sizes in ((1, "0.5,0.25", [4, 2]), (2, "0.25,0.5", [2, 4])):
        made.plugins.plugins["profile.levels"].mix = mix
        run_round(made.state, number, made.engine)
        dilators = made.plugins.plugins["extract.fedconv"]._dilators
        assert [dilators[c].selection.sizes["1"] for c in range(2)] == sizes
    assert not any("fault" in row for row in made.state.client_rows)
