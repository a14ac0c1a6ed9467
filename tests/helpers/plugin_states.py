"""A plugin's state in another plugin of its class."""

from __future__ import annotations


def loaded(plugin):
    other = type(plugin)()
    other.load_state_dict(plugin.state_dict())
    return other
