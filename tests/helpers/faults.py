"""A plugin that spoils what client 1 answers."""

from __future__ import annotations

import time

from helpers.runs import ready
from hetfl.hooks.base import Plugin
from hetfl.hooks.hookspecs import hookimpl

SPOILT = []


class Bad(Plugin):
    """Spoils the replies of client 1."""

    @hookimpl(wrapper=True)
    def fit(self, task):
        reply = yield
        return SPOILT[0](reply) if task.client == 1 and len(SPOILT) else reply


def boom(reply):
    raise ValueError("boom")


def quitting(reply):
    raise SystemExit(3)


def late(reply):
    time.sleep(1.5)
    return reply


def changed(**fields):
    def spoil(reply):
        for name, change in fields.items():
            setattr(reply, name, change(reply))
        return reply

    return spoil


def first(reply):
    return next(n for n, t in reply.state.items() if t.ndim > 1)


def with_bad(monkeypatch, spoil, **values):
    from hetfl.hooks.manager import PluginManager
    from hetfl.rounds import setup

    load = setup.loading.load_plugins
    monkeypatch.setattr(setup.loading, "load_plugins", lambda options: PluginManager({**load(options).plugins, "wrap.bad": Bad()}))
    SPOILT[:] = [spoil] if spoil else []
    base = {"extract": "heterofl", "aggregate": "overlap", "cohorts": "off"}
    return ready(0, **{**base, **values})
