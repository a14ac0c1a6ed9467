"""Private names of Flower, in one module."""

from __future__ import annotations

import pytest

from helpers.paths import ROOT


def test_private_names_of_flower_stay_in_one_module_and_this_version_has_them():
    from importlib.metadata import version

    from hetfl.engines import flower_internals as private

    assert version("flwr").startswith(private.TESTED), f"hetfl is tested with flwr {private.TESTED}"
    using = {
        str(path.relative_to(ROOT))
        for folder in ("core", "plugins", "cli")
        for path in (ROOT / folder).rglob("*.py")
        if any(name in path.read_text() for name in ("flwr.supercore", '"_message_id"'))
    }
    assert using == {"core/engines/flower_internals.py"}


def test_an_unfit_flower_is_said_in_a_sentence(monkeypatch):
    import importlib
    import sys

    from hetfl.engines import flower_internals as private
    from hetfl.errors import UsageError

    monkeypatch.setitem(sys.modules, "flwr.supercore.run", None)
    with pytest.raises(UsageError, match=r"flwr .* lacks what hetfl needs of it .* install flwr 1\.41"):
        importlib.reload(private)
