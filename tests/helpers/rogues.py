"""Plugins of somebody else that do what no plugin should."""

from __future__ import annotations

from dataclasses import replace

import torch

from hetfl import Merged, Plugin, Profile, hookimpl, running_mean


class Mute(Plugin):
    @hookimpl
    def profile(self, node):
        return Profile(0.5, 5 if node.client == 1 else "")


class Careless(Plugin):
    """Leaves its thread without gradients, and writes into what it was sent."""

    @hookimpl(wrapper=True)
    def fit(self, task):
        for tensor in (*task.masks.values(), *task.extras.values()):
            tensor.zero_()
        try:
            return (yield)
        finally:
            torch.set_grad_enabled(False)


class Sparse(Plugin):
    @hookimpl(wrapper=True)
    def fit(self, task):
        reply = yield
        return replace(reply, state={n: t.to_sparse() for n, t in reply.state.items()}) if task.client == 1 else reply


HOW = [lambda merged: merged]


class Merging(Plugin):
    """The last of HOW makes another Merged of a good one."""

    @hookimpl
    def aggregate(self, server, updates):
        return HOW[-1](Merged(running_mean(server.state, updates)))
