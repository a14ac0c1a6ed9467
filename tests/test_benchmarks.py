"""The scripts of benchmarks/: they find what they import of hetfl, time the same work, and what they count is within its bound."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from dataclasses import replace

import pytest

from helpers.paths import ROOT
from hetfl.config import resolve
from hetfl.rounds.loop import run_round
from hetfl.rounds.reporting import NoCallback
from hetfl.runs.experiment import prepare

SCRIPTS = sorted((ROOT / "benchmarks").rglob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_imports_names_that_exist(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hetfl":
            module = importlib.import_module(node.module)
            names = [alias.name for alias in node.names]
            missing = [
                name for name in names if not hasattr(module, name) and not importlib.util.find_spec(f"{node.module}.{name}")
            ]
            assert not missing, f"{path.name}: {node.module} has no {missing}"


def test_the_floor_trains_the_submodels_that_hetfl_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.setenv("HETFL_BENCH", str(tmp_path))
    from benchmarks.speed.floor import Loop
    from benchmarks.speed.work import WORKS, norm

    whole = WORKS["heflwr"]
    work = replace(whole, data="", clients=2, sampled=2, examples=8, more={**whole.more, "levels": "1:1,0.5:1"})
    floor = Loop(work)
    floor.round(1)
    made = prepare(resolve(work.values), NoCallback())
    before = norm(made.server.state.values())
    run_round(made.state, 1, made.engine)
    assert norm(made.server.state.values()) == pytest.approx(norm(floor.state), rel=1e-6)
    assert norm(made.server.state.values()) != pytest.approx(before, rel=1e-6)


@pytest.mark.slow
def test_a_round_is_read_in_few_files():
    said = subprocess.run([sys.executable, ROOT / "benchmarks" / "crossings.py"], capture_output=True, text=True, check=True).stdout
    assert int(said.splitlines()[-1].split()[0]) <= 118, said
