"""Small updates, servers and means for the numeric oracles of the specs."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import settings

from hetfl.aggregation.updates import Update, Updates
from hetfl.hooks.manager import PluginManager
from hetfl.hooks.server import Server
from hetfl.hooks.values import Client
from hetfl.profiling.node import Profile
from hetfl.submodel.plan import Patch

T = torch.tensor


quick = settings(deadline=None, max_examples=25)


def close(a, b, within=1e-6):
    return torch.allclose(torch.as_tensor(a, dtype=torch.float32), torch.as_tensor(b, dtype=torch.float32), atol=within, rtol=0)


def update(client, values, weight=1.0, mask=None, index=None):
    where = {} if index is None else index
    return Update(client, {"v": Patch(T(values), where, None if mask is None else T(mask, dtype=torch.bool))}, weight)


def over(old, *updates):
    return Updates(list(updates), {"v": T(old)})


class Double(SimpleNamespace):
    branch = Server.branch


def server_with(widths=None, **clients):
    """A server as an aggregation sees it: client i at the width given as c<i>."""
    known = {int(name[1:]): Client(int(name[1:]), Profile(width)) for name, width in clients.items()}
    return Double(clients=known, branches={}, state=None, widths=widths, alarms=[])


def merged(plugin, updates, server=None):
    """What an aggregation plugin makes of `updates`, whether it takes them together or one by one."""
    server = server or server_with()
    server.state = updates.old
    return PluginManager({"aggregate.it": plugin}).aggregate(server, updates, 1)
