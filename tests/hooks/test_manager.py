"""Which plugin a hook is asked of, and in what order."""

from __future__ import annotations

import pytest

from hetfl.errors import UsageError
from hetfl.hooks.base import Plugin
from hetfl.hooks.hookspecs import hookimpl
from hetfl.hooks.manager import PluginManager


class Misspelt(Plugin):
    @hookimpl
    def aggregate(self, server, updatez):
        return None


def test_a_misspelt_hook_argument_is_refused():
    with pytest.raises(UsageError, match="updatez"):
        PluginManager({"aggregate.misspelt": Misspelt()})


class Outer(Plugin):
    log: list[str] = []

    @hookimpl(wrapper=True)
    def fit(self, task):
        task.append(type(self).__name__)
        return (yield)


class Core(Outer):
    pass


class Inner(Outer):
    pass


def test_wraps_stand_outside_in_and_the_extraction_innermost(monkeypatch):
    from hetfl.training import local as train

    monkeypatch.setattr(train, "fit", lambda task: task)
    roles = PluginManager({"extract.core": Core(), "wrap.outer": Outer(), "wrap.inner": Inner()})
    assert roles.fit([]) == ["Outer", "Inner", "Core"]
