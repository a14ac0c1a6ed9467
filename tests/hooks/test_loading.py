"""Plugins from options."""

from __future__ import annotations

import pytest

from hetfl.config import resolve
from hetfl.errors import UsageError
from hetfl.hooks.loading import load_plugins


def test_ambiguous_and_foreign_options():
    with pytest.raises(UsageError, match="no chosen plugin is named 'fedconv'"):
        load_plugins(resolve({"extract": "heterofl", "set": {"fedconv": {"steps": 1}}}))
    roles = load_plugins(resolve({"extract": "fedrolex", "set": {"extract": {"fedrolex": {"step": 2}}}}))
    assert roles.plugins["extract.fedrolex"].step == 2
