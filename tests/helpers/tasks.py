"""A client's work, for what acts on it."""

from __future__ import annotations

from hetfl.training.task import Task


def make_task(server):
    """A task whose model is the whole of `server`'s."""
    full = server.builder.full
    names = ("client", "round", "data", "options", "extras", "client_state")
    model = server.builder.load(server.state).train()
    return Task(**dict.fromkeys(names), model=model, plan_sizes=full, full_sizes=full, builder=server.builder)  # type: ignore[arg-type]
