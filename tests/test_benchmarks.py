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


def test_a_section_of_a_page_is_replaced_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    cells = importlib.import_module("cells")
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- one -->\nold\n<!-- end one -->\nb\n<!-- two -->\nkept\n<!-- end two -->\n")
    cells.fill_section(page, "one", "new\n")
    assert page.read_text() == "a\n<!-- one -->\nnew\n<!-- end one -->\nb\n<!-- two -->\nkept\n<!-- end two -->\n"
    with pytest.raises(SystemExit, match="no section"):
        cells.fill_section(page, "three", "new\n")


def test_depth_is_compared_by_what_each_size_of_device_gets(monkeypatch):
    """A size's own model where there is one; of a method that leaves a size out there is no mean."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    depth = importlib.import_module("depth")
    levels = {f"level-{level}@test": 0.5 for level in depth.LEVELS}
    found = depth.add_levels({**levels, "personal-1@test": 0.9, "personal-0.5@test": 0.1})
    assert (found["mean of devices"], found["worst of devices"]) == (0.5, 0.1)
    assert "mean of devices" not in depth.add_levels({"level-1@test": 0.5})


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
