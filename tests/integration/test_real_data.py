"""Real data of every kind with its model, end to end through the command line (slow)."""

from __future__ import annotations

import csv
import json
import math

import pytest

from helpers.cli import exit_code
from helpers.paths import REAL
from hetfl import registry

BRIEF = "--limit 120 --rounds 2 --epochs 1 --server-data 0.2 --pretrain-steps 4 --eval-batch-size 64".split()


FEW = ["--clients", "4", "--alpha", "10"]


OPTIONS = {
    "dac": ["dac.epochs=1", "dac.patience=1", "dac.stall=0.3"],
    "lotteryfl": ["lotteryfl.threshold=0"],
    "hermes": ["hermes.threshold=0"],
}


OTHERS = [e.name for e in registry.builtins() if e.role == "extract" and e.any_model and e.name not in ("heterofl", "fedconv")]


SETS = ("mnist", "ag_news", "sp_sw_har")  # pictures, text, sensors: each strategy trains on one of them

NETS_ALONE = {"splitmix": "mnist"}  # an encoder's layer norms are no mean of bases


@pytest.mark.slow
@pytest.mark.parametrize(("extract", "name"), [(e, NETS_ALONE.get(e, SETS[i % 3])) for i, e in enumerate(OTHERS)])
def test_other_strategies_on_real_data(tmp_path, name, extract):
    folder = REAL / name
    if not folder.is_dir():
        pytest.skip(f"real data set {folder} is not on this machine")
    options = [word for option in OPTIONS.get(extract, []) for word in ("--set", option)]
    model = {"mnist": ["--model", "preresnet18", "--model-args", "widths=[8,16,16,16]"], "sp_sw_har": ["--model", "cnn1d"]}.get(
        name, []
    )
    if extract == "dac":  # the residual stream of the other net cannot be gated, so that narrow levels are out of reach
        model = ["--model", "cnn", "--model-args", "widths=[8,16,16]"]
    words = ["--dataset", str(folder), "--extract", extract, "--out", str(tmp_path / "a"), "--levels", "1,0.5,0.25,0.25"]
    assert exit_code("run", *words, *BRIEF, *FEW, *model, *options) == 0
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["rounds"] == 2
    assert not any("left out" in note for note in summary["notes"])


SETS = {
    "mnist": ["--model", "cnn", *FEW],
    "cifar10": ["--model", "resnet18", "--model-args", "widths=[16,32,64,64]", *FEW],
    "cifar10 googlenet": ["--model", "googlenet", "--model-args", "shrink=4", *FEW],
    "cifar10 mobilenetv2": ["--model", "mobilenetv2", "--model-args", "width=0.5", *FEW],
    "ag_news": FEW,
    "sp_sw_har": ["--partition", "natural", "--limit", "600"],
    "wiar_height": ["--partition", "natural"],
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "extract"), [(name, ("heterofl", "fedconv")[i % 2]) for i, name in enumerate(SETS)])
def test_real_data_end_to_end(tmp_path, name, extract):
    folder = REAL / name.split()[0]
    if not folder.is_dir():
        pytest.skip(f"real data set {folder} is not on this machine")
    tuned = ["--set", "fedconv.steps=2", "--set", "fedconv.first_steps=2"] if extract == "fedconv" else []
    words = ["--dataset", str(folder), "--extract", extract, "--aggregate", "overlap", "--out", str(tmp_path / "a")]
    assert exit_code("run", *words, *BRIEF, *SETS[name], *tuned) == 0
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["rounds"] == 2
    with open(tmp_path / "a" / "metrics.csv") as file:
        last = list(csv.DictReader(file))[-1]
    assert summary["accuracy"]["global@test"]["last"] == pytest.approx(float(last["global@test"]))
    assert math.isfinite(summary["accuracy"]["global@test"]["loss"])
    assert summary["weights sha256"] != json.loads((tmp_path / "a" / "run.json").read_text())["initial weights sha256"]
    parameters = [level["parameters"] for level in summary["levels"]]
    assert parameters == sorted(set(parameters), reverse=True)
    assert not any("left out" in note for note in summary["notes"])
    assert summary["clients"] == {"sp_sw_har": 23, "wiar_height": 3}.get(name, 4)
