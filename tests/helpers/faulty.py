"""A plugin for every check of `hetfl.testing` that fails it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import PrivateAttr

from hetfl import Merged, Plugin, Profile, Selection, hookimpl, prefix, running_mean


class Leading(Plugin):
    """A right one: the leading channels."""

    @hookimpl
    def extract(self, server, clients, round):
        return [server.select(prefix(client.profile.width)) for client in clients]


class Shifting(Plugin):
    """Base: the kept channels begin where `start` says."""

    def start(self, server, round):
        return 0

    @hookimpl
    def extract(self, server, clients, round):
        start = self.start(server, round)

        def rule(width):
            return lambda size: (torch.arange(-(-size * width // 1), dtype=torch.int64) + start) % size

        return [server.select(rule(client.profile.width)) for client in clients]


class Picky(Leading):
    @hookimpl
    def extract(self, server, clients, round):
        if not server.averages:
            raise ValueError("I want a mean")
        return super().extract(server, clients, round)


class Entropy(Shifting):
    def start(self, server, round):
        return int.from_bytes(os.urandom(4), "little")


class CountsWorkers(Shifting):
    def start(self, server, round):
        return server.pool.workers


class CountsCalls(Leading):
    _calls: list = PrivateAttr(default_factory=list)

    @hookimpl(wrapper=True)
    def fit(self, task):
        reply = yield
        self._calls.append(task.client)
        return replace(reply, examples=len(self._calls))


class GlobalDraw(Shifting):
    def start(self, server, round):
        return int(torch.randint(8, ()))


class ReadsClock(Shifting):
    def start(self, server, round):
        time.time()
        return 0


class Decays(Plugin):
    @hookimpl
    def aggregate(self, server, updates, round):
        return Merged({n: t * 0.999 if t.is_floating_point() else t for n, t in running_mean(server.state, updates).items()})


class Undeclared(Leading):
    @hookimpl
    def client_extras(self, client):
        return {"secret": torch.zeros(1)}


class WantsAll(Plugin):
    @hookimpl
    def aggregate(self, server, updates, round):
        updates = list(updates)
        _one, _two, _three = updates
        return Merged(running_mean(server.state, updates))


class Hoards(Leading):
    _kept: list = PrivateAttr(default_factory=list)

    @hookimpl
    def finalize(self, server, merged):
        self._kept.append(next(iter(merged.state.values())))

    def state_dict(self):
        return {str(i): t for i, t in enumerate(self._kept)}

    def load_state_dict(self, state):
        self._kept[:] = state.values()


class Slow(Leading):
    @hookimpl(wrapper=True)
    def fit(self, task):
        time.sleep(0.3)
        return (yield)


class Narrow(Plugin):
    @hookimpl
    def extract(self, server, clients, round):
        return [server.select(prefix(0.7 * client.profile.width)) for client in clients]


@dataclass(frozen=True, eq=False)
class Misplaced(Selection):
    def put(self, trained):
        found = super().put(trained)
        return {
            n: replace(p, index={d: w.flip(0) for d, w in p.index.items()}) if p.values.ndim > 1 else p for n, p in found.items()
        }


class PutsElsewhere(Plugin):
    @hookimpl
    def extract(self, server, clients, round):
        return [Misplaced(server.widths, server.widths.select(prefix(client.profile.width))) for client in clients]


class Greedy(Plugin):
    @hookimpl
    def extract(self, server, clients, round):
        return [server.select(prefix(1.0)) for _ in clients]


class Wide(Plugin):
    _asked: list = PrivateAttr(default_factory=list)

    @hookimpl
    def profile(self, node):
        self._asked.append(node)
        return Profile(1 / (1 + len(self._asked) % 2))


class Forgets(Shifting):
    _round: list = PrivateAttr(default_factory=list)

    def start(self, server, round):
        self._round.append(round)
        return len(self._round)


class SharesMemory(Leading):
    """Its client side reads what its server side wrote, which it cannot on a node."""

    _round: list = PrivateAttr(default_factory=list)

    @hookimpl
    def extract(self, server, clients, round):
        self._round.append(round)
        return super().extract(server, clients, round)

    @hookimpl(wrapper=True)
    def fit(self, task):
        reply = yield
        return replace(reply, examples=1 + len(self._round) * (task.client + 1))


class OwnForward(Plugin):
    """Says that clients may train as one, but its forward pass has a client's own tensor from elsewhere than its constants."""

    stackable: ClassVar[bool] = True

    @hookimpl(wrapper=True)
    def fit(self, task):
        scale = torch.tensor(1.0 + task.client)
        task.forward = lambda model, x: scale * model(x)
        return (yield)


class ReadsProcess(Leading):
    @hookimpl(wrapper=True)
    def fit(self, task):
        reply = yield
        return replace(reply, examples=1 + os.getpid() % 1000 * (task.client + 1))


def wrong_number():
    assert 2 + 2 == 5, "the paper says 5"


def right_number():
    assert 2 + 2 == 4
