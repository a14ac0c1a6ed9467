"""FedSA-LoRA (Guo et al., ICLR 2025): the adapters' A is shared, every client keeps a B of its own."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from hetfl import Client, Exchange, NotApplicable, Plugin, Server, hookimpl
from hetfl.models.adapters import list_adapters


class FedSA(Plugin):
    """lora_B never leaves its client, which begins with an untrained one."""

    trains_global: ClassVar[bool] = False

    @hookimpl
    def exchange(self, server: Server, client: Client, names: Collection[str]) -> Exchange:
        own = {adapter.b for adapter in list_adapters(list(server.state))}
        if not own:
            raise NotApplicable(
                "not applicable: fedsa shares one half of adapters, and no adapter (--adapter lora:rank=8) has two that are trained"
            )
        shared = frozenset(names) - own
        return Exchange(down=shared, up=shared)
