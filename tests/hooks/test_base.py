"""What the base class promises to plugin authors."""

from __future__ import annotations

import pytest

from hetfl.hooks.base import Plugin
from hetfl.plugins.profiles.levels import Levels


def test_an_option_may_not_bear_a_hooks_name():
    with pytest.raises(TypeError, match="bears a hook's name"):
        type("Bad", (Plugin,), {"__annotations__": {"extract": int}, "extract": 3, "__module__": __name__})


def test_equal_options_are_two_plugins():
    assert Levels() != Levels()
    assert len({Levels(), Levels()}) == 2
