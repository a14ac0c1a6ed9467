"""Which of a user's own modules go where the clients are."""

from __future__ import annotations

import sys

from hetfl.config import resolve
from hetfl.engines.modules import find_own_modules


def test_what_the_run_names_by_its_module_is_shipped_with_what_lies_beside_it(tmp_path, monkeypatch):
    """Its own neighbours too; nothing that is installed, and nothing of hetfl."""
    for name in ("mine_net", "mine_parts", "not_asked"):
        (tmp_path / f"{name}.py").write_text("import mine_parts\n" if name == "mine_net" else "")
    monkeypatch.syspath_prepend(tmp_path)
    import mine_net  # noqa: F401

    try:
        found = find_own_modules(resolve({"model": "mine_net:Net", "dataset": "digits"}))
        assert found == [tmp_path / "mine_net.py", tmp_path / "mine_parts.py"]
        assert find_own_modules(resolve({"model": "torch:Net"})) == []
        assert find_own_modules(resolve({"model": "mlp"})) == []
    finally:
        del sys.modules["mine_net"], sys.modules["mine_parts"]
