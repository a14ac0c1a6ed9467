"""Numbers of the paper, or worked out by hand, that must come out: `hfl check` asks for them on the way to gold."""

from __future__ import annotations

from hetfl.cli.templates.profile import Template


def check_by_hand() -> None:
    """Raises AssertionError where a number is another one."""
    plugin = Template(busy=0.25, width=0.5)
    assert [plugin.decide(draw).width for draw in (0.0, 0.24, 0.25, 0.9)] == [0.5, 0.5, 1.0, 1.0]
