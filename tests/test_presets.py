"""Papers' experiments by name."""

from __future__ import annotations

import json

import pytest

from helpers.cli import exit_code
from hetfl import presets
from hetfl.config import merge_options, resolve
from hetfl.errors import UsageError
from hetfl.hooks import loading


@pytest.mark.parametrize("preset", presets.presets().values(), ids=lambda p: p.name)
def test_every_preset_is_a_run(preset):
    options = resolve({**preset.values, "preset": preset.name})
    loading.load_plugins(options)
    assert preset.about
    assert len(preset.digest) == 64


@pytest.mark.parametrize("letter", "bcde")
@pytest.mark.parametrize("split", ["mnist-iid", "mnist-noniid", "cifar10-iid", "cifar10-noniid"])
def test_a_narrow_level_of_heterofl_is_a_net_of_its_own(split, letter):
    """Not the leading channels of the whole one, whose first weights are smaller: the code builds it narrow (spec heterofl 2.1)."""
    options = resolve(presets.find_preset(f"heterofl/{split}-{letter}").values)
    assert options.model_args["widths"] == [width >> "abcde".index(letter) for width in (64, 128, 256, 512)]
    assert options.model_args.get("blocks") == ([1, 1, 1, 2] if "cifar10" in split else None)
    assert (options.levels, options.global_width) == ("a1", 1.0)


def test_a_preset_is_recorded_with_what_was_changed(tmp_path):
    words = [
        "run",
        "--preset",
        "heflwr/mnist-iid-fjord",
        "--dataset",
        "digits",
        "--limit",
        "200",
        "--rounds",
        "1",
        "--out",
        str(tmp_path / "r"),
    ]
    assert exit_code(*words) == 0
    found = json.loads((tmp_path / "r" / "run.json").read_text())["preset"]
    assert found == {
        "name": "heflwr/mnist-iid-fjord",
        "sha256": presets.find_preset("heflwr/mnist-iid-fjord").digest,
        "changed": ["rounds", "dataset"],
    }
    with pytest.raises(UsageError, match=r"did you mean 'heflwr/mnist-iid-fjord'\? \(hfl presets lists them\)"):
        presets.find_preset("heflwr/mnist-iid-fjor")


def test_settings_are_laid_over_each_other():
    assert merge_options({"a": 1, "set": {"x": {"p": 1, "q": 2}}}, {"b": 2, "set": {"x": {"q": 3}}}) == {
        "a": 1, "b": 2, "set": {"x": {"p": 1, "q": 3}},
    }  # fmt: skip
