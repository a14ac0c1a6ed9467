"""Every script of benchmarks/ still finds what it imports of hetfl."""

from __future__ import annotations

import ast
import importlib

import pytest

from helpers.paths import ROOT


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_imports_names_that_exist(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hetfl":
            module = importlib.import_module(node.module)
            names = [alias.name for alias in node.names]
            missing = [
                name for name in names if not hasattr(module, name) and not importlib.util.find_spec(f"{node.module}.{name}")
            ]
            assert not missing, f"{path.name}: {node.module} has no {missing}"
