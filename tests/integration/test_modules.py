"""Modules that nobody wrote for us, trained by every kind of extraction."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from safetensors.torch import load as read

from helpers.modules import MODULES
from hetfl.config import resolve
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import runner
from hetfl.runs.folder import RunFolder


@pytest.fixture
def held_out(monkeypatch):
    module = types.ModuleType("held_out")
    for name, made in MODULES.items():
        setattr(module, name, made)
    monkeypatch.setitem(sys.modules, "held_out", module)


@pytest.mark.parametrize("extract", ["heterofl", "fedrolex", "fedconv"])
@pytest.mark.parametrize("name", ["heads", "torchs", "recurrent", "odd", "mixer", "start"])
def test_any_module_trains_with_any_extraction(held_out, tmp_path, extract, name):
    values = {"limit": 200, "clients": 3, "rounds": 2, "epochs": 1, "pretrain_steps": 3, "partition": "iid", "lr": 0.01}
    options = {"fedconv": {"steps": 2, "first_steps": 2}} if extract == "fedconv" else {}
    found = []
    for workers in (2,) if extract == "fedconv" else (1, 2):  # fedconv's bits for any number of workers: test_pairs.py
        folder = RunFolder(tmp_path / str(workers)).open()
        chosen = {"extract": extract, "aggregate": "overlap", "model": f"held_out:{name}", "levels": "1:1,0.5:1,0.25:1"}
        runner.run(resolve({**values, **chosen, "set": options, "workers": workers}), folder, NoCallback())
        found.append(read((folder.path / "weights.safetensors").read_bytes()))
    assert all(bool(torch.isfinite(t).all()) for t in found[0].values())
    assert all(torch.equal(t, found[-1][n]) for n, t in found[0].items())
