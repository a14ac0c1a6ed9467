"""Numbers of the paper, or worked out by hand, that must come out: `hfl check` asks for them on the way to gold."""

from __future__ import annotations

from hetfl.cli.templates.extract import choose_units


def check_by_hand() -> None:
    """Raises AssertionError where a number is another one."""
    assert choose_units(8, 0.5, 0).tolist() == [0, 2, 4, 6]
    assert choose_units(8, 0.5, 1).tolist() == [1, 3, 5, 7]
    assert choose_units(5, 0.5, 0).tolist() == [0, 1, 3], "ceil(2.5) units"
