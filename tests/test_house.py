"""The house's rules: imports, sizes of files, and that every part is packaged. `lint-imports` holds the ladder itself."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import statistics
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest

from helpers.paths import ROOT
from hetfl import registry

FOLDERS = {"core": "hetfl", "plugins": "hetfl.plugins", "cli": "hetfl.cli"}

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]


@cache
def modules():
    """The path of every module of hetfl by its name."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def imported(tree):
    """The modules that a file imports, those for types and within functions too; `hetfl` itself, the lazy face, does not count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules() else node.module


@cache
def graph():
    """What each module imports of hetfl."""
    known = modules().keys() - {"hetfl"}
    return {name: {n for n in imported(ast.parse(modules()[name].read_text())) if n in known} for name in known}


def layers(edges):
    """The length of the longest chain of imports. Raises CycleError."""
    depth = {}
    for name in TopologicalSorter(edges).static_order():
        depth[name] = 1 + max((depth[n] for n in edges[name]), default=0)
    return max(depth.values())


def rooms():
    """The graph of imports between the parts of hetfl: its packages and ground modules."""
    part = lambda name: name.split(".")[1]  # noqa: E731
    found = {part(name): set() for name in graph()}
    for name, others in graph().items():
        found[part(name)] |= {part(n) for n in others} - {part(name)}
    return found


def test_the_graph_sees_imports_of_every_kind():
    code = "import hetfl.rng\nif TYPE_CHECKING:\n    from hetfl.data import npz\ndef f():\n    from hetfl.files import shipped\n"
    assert set(imported(ast.parse(code))) == {"hetfl.rng", "hetfl.data.npz", "hetfl.files"}
    assert layers({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"c"}}) == 3
    with pytest.raises(CycleError):
        layers({"a": {"b"}, "b": {"a"}})


def test_no_module_imports_itself_by_way_of_others():
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_rooms_stand_on_at_most_twelve_layers():
    (ladder,) = (contract["layers"] for contract in PROJECT["importlinter"]["contracts"] if "layers" in contract)
    assert {name for rung in ladder for name in re.split(r" [|:] ", rung)} == rooms().keys()
    assert len(ladder) <= 12
    assert layers(rooms()) <= 12


def test_files_can_be_read_at_a_sitting():
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in modules().values() if p.name != "__init__.py"}
    core = {path: count for path, count in lines.items() if path.startswith("core/")}
    assert 60 <= statistics.median(core.values()) <= 130
    assert not {path: count for path, count in core.items() if count > 320}


def test_typings_link_every_part():
    """.typings/hetfl is the package as one folder, for type checkers and import-linter."""
    links = {path.name: path for path in (ROOT / ".typings" / "hetfl").iterdir()}
    parts = {path.name: path for path in (ROOT / "core").iterdir() if path.name != "__pycache__"}
    parts |= {"plugins": ROOT / "plugins", "cli": ROOT / "cli"}
    assert links.keys() == parts.keys()
    for name, link in links.items():
        assert not os.path.isabs(link.readlink()), "it would lead out of another checkout"
        assert link.resolve() == parts[name]


def test_every_package_is_shipped():
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert set(PROJECT["setuptools"]["packages"]) == packages | {"hetfl.index"}
    bare = {path.parent for path in modules().values()} - {path.parent for path in modules().values() if path.name == "__init__.py"}
    assert not bare, "folders of modules without an __init__.py"


def test_the_core_names_no_strategy():
    names = {e.name for e in registry.builtins() if e.role != "profile"} - {"full", "overlap"}
    for path in (ROOT / "core").rglob("*.py"):
        code = [line for line in path.read_text().splitlines() if " == " in line or "import" in line]
        found = [line for line in code for n in names if f"'{n}'" in line or f'"{n}"' in line or f"plugins.{n}" in line]
        assert not found, path


def test_every_named_mutation_can_still_be_made():
    """Who changes a line of plugins/ that benchmarks/mutations.py mutates gives it the new line."""
    spec = importlib.util.spec_from_file_location("mutations", ROOT / "benchmarks" / "mutations.py")
    mutations = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = mutations  # for its dataclass
    spec.loader.exec_module(mutations)
    mutations.refuse_stale(mutations.MUTATIONS)
    named = {word for m in mutations.MUTATIONS for word in m.tests.split() if word.startswith("tests/")}
    assert [word for word in sorted(named) if not (ROOT / word).exists()] == []


def test_nothing_that_a_run_leaves_is_tracked():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert not [name for name in tracked if name.endswith((".safetensors", "metrics.csv", "clients.csv"))]
