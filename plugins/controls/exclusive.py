"""The bound that any method must pass: only the clients that can afford the full model train (field notes 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

from hetfl import Client, Field, Plan, Plugin, Server, hookimpl, prefix


class Exclusive(Plugin):
    """The model of width `width` for the clients that can afford it; the others sit out."""

    width: float = Field(1.0, gt=0, le=1, description="the width that is trained; smaller clients sit out")

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan | None]:
        able = [client.profile.width >= self.width for client in clients]
        if not any(able):
            server.notes.append(f"exclusive: in some rounds no client could afford width {self.width:g}")
        return [server.select(prefix(self.width)) if fits else None for fits in able]
