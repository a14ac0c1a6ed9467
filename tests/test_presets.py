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
