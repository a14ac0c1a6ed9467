"""A wrap whose client ends its process in the midst of training."""

from __future__ import annotations

import os
import signal
import time

from hetfl import Plugin, hookimpl


class Deadly(Plugin):
    """Client 1 of round 1 is killed."""

    @hookimpl(wrapper=True)
    def fit(self, task):
        if (task.client, task.round) == (1, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return (yield)


class Failing(Plugin):
    """Client 1 of round 1 raises while the others train."""

    @hookimpl(wrapper=True)
    def fit(self, task):
        if (task.client, task.round) == (1, 1):
            time.sleep(1)
            raise ValueError("not today")
        return (yield)


class Slow(Plugin):
    """Every client takes a while."""

    @hookimpl(wrapper=True)
    def fit(self, task):
        time.sleep(0.4)
        return (yield)
