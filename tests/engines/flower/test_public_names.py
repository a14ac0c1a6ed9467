"""hetfl uses what Flower publishes, and the version that it was tested with."""

from __future__ import annotations

from importlib.metadata import version

from helpers.paths import ROOT


def test_no_private_name_of_flower_is_used():
    assert version("flwr").startswith("1.41"), "hetfl is tested with flwr 1.41"
    using = [
        str(path.relative_to(ROOT))
        for folder in ("core", "plugins", "cli")
        for path in (ROOT / folder).rglob("*.py")
        if any(name in path.read_text() for name in ("flwr.supercore", "flwr.common", '"_message_id"'))
    ]
    assert using == []
