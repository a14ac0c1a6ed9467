"""HeteroFL (Diao et al., ICLR 2021): the leading channels of every layer (spec heterofl 2.2).

Its other parts go with any extraction: `--wrap scaler`, `--wrap maskloss` and `--norm-policy static`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from hetfl import Client, Plan, Plugin, Server, hookimpl, prefix


class HeteroFL(Plugin):
    """Nested slices: every client gets the first units of its width, so a narrower client's model lies within a wider one's."""

    plans_by_width: ClassVar[bool] = True

    @hookimpl
    def extract(self, server: Server, clients: Sequence[Client]) -> list[Plan]:
        return [server.select(prefix(client.profile.width)) for client in clients]
