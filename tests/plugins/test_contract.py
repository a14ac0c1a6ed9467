"""Plugins read the contract (`from hetfl import …`) and the toolbox, and nothing else of the core."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

import hetfl
from helpers.paths import ROOT
from hetfl.hooks.toolbox import TOOLBOX

PLUGINS = ROOT / "plugins"
FOR_PEOPLE = {"run", "load", "resume", "matrix", "Run", "Matrix", "shrink", "Shrunk", "width_groups"}  # and not for plugins

MODULES = {
    ".".join(("hetfl.plugins", *path.relative_to(PLUGINS).with_suffix("").parts)): path
    for path in sorted(PLUGINS.rglob("*.py"))
    if path.name != "__init__.py"
}


def core_imports(source: str) -> list[tuple[str, str]]:
    """What a file imports from hetfl: (module, "" for hetfl itself; name, "" for the whole module), in functions too."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(alias.name.partition(".")[2], "") for alias in node.names if alias.name.split(".")[0] == "hetfl"]
        elif isinstance(node, ast.ImportFrom):
            top, _, module = (node.module or "").partition(".")
            if node.level or (top == "hetfl" and module.split(".")[0] != "plugins"):
                found += [("." * node.level + module, alias.name) for alias in node.names]
    return found


def undeclared(source: str) -> list[str]:
    """What a plugin's source imports from hetfl that is neither in the contract nor in the toolbox."""
    allowed = {("", name) for name in hetfl.__all__ if name not in FOR_PEOPLE}
    allowed |= {(module, name) for module, (names, _) in TOOLBOX.items() for name in names}
    return [".".join(filter(None, ("hetfl", *found))) for found in core_imports(source) if found not in allowed]


@pytest.mark.parametrize("module", MODULES)
def test_a_plugin_reads_only_the_contract_and_the_toolbox(module):
    importlib.import_module(module)
    assert undeclared(MODULES[module].read_text()) == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from hetfl.rounds.loop import Rounds", "hetfl.rounds.loop.Rounds"),
        ("from hetfl.submodel.blocks import Index", "hetfl.submodel.blocks.Index"),
        ("from hetfl.submodel import blocks", "hetfl.submodel.blocks"),
        ("import hetfl.submodel.blocks", "hetfl.submodel.blocks"),
        ("from hetfl import run", "hetfl.run"),
        ("def f():\n    from hetfl.engines import local", "hetfl.engines.local"),
    ],
)
def test_what_is_not_declared_is_found(line, found):
    assert undeclared(f"from hetfl import Plugin\n{line}\n") == [found]


def test_relative_imports_are_found():
    assert undeclared("from ..methods import pruning\n")


@pytest.mark.parametrize("module", TOOLBOX)
def test_the_toolbox_is_there_and_somebody_needs_it(module):
    names, purpose = TOOLBOX[module]
    used = {name for path in MODULES.values() for of, name in core_imports(path.read_text()) if of == module}
    assert set(names) <= set(vars(importlib.import_module(f"hetfl.{module}")))
    assert set(names) == used, "a tool that no built-in plugin uses is no tool yet"
    assert re.fullmatch(r"\S.*[^.\n]", purpose)
    assert not set(names) & set(hetfl.__all__)


def test_the_contract_is_there():
    assert all(hasattr(hetfl, name) for name in hetfl.__all__)
    assert len(set(hetfl.__all__)) == len(hetfl.__all__)
