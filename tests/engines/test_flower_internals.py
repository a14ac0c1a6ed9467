"""Private names of Flower, in one module."""

from __future__ import annotations

import pytest


def test_private_names_of_flower_stay_in_one_module_and_this_version_has_them():
    from importlib.metadata import version
    from pathlib import Path

    from hetfl.engines import flower_internals as private

    assert version("flwr").startswith(private.TESTED), f"hetfl is tested with flwr {private.TESTED}"
    root = Path(private.__file__).parents[1]
    for path in [*root.glob("core/*.py"), *root.glob("plugins/*.py"), *root.glob("cli/*.py")]:
        text = path.read_text()
        assert path.name == "private.py" or ("flwr.supercore" not in text and '"_message_id"' not in text), path


def test_an_unfit_flower_is_said_in_a_sentence(monkeypatch):
    import importlib
    import sys

    from hetfl.engines import flower_internals as private
    from hetfl.errors import UsageError

    monkeypatch.setitem(sys.modules, "flwr.supercore.run", None)
    with pytest.raises(UsageError, match=r"flwr .* lacks what hetfl needs of it .* install flwr 1\.41"):
        importlib.reload(private)
