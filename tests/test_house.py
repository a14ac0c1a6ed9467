"""The house's rules."""

from __future__ import annotations

from helpers.paths import ROOT
from hetfl import registry


def test_the_core_names_no_strategy():
    names = {e.name for e in registry.builtins() if e.role != "profile"} - {"full", "overlap"}
    for path in (ROOT / "core").glob("*.py"):
        code = [line for line in path.read_text().splitlines() if " == " in line or "import" in line]
        told = [line for line in code for n in names if f"'{n}'" in line or f'"{n}"' in line or f"plugins.{n}" in line]
        assert not told, path
