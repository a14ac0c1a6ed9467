"""Clients drawn with equal chances (McMahan et al., AISTATS 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch

from hetfl import Client, Plugin, Server, hookimpl


class Uniform(Plugin):
    """As many as are wanted, of those that are there, each with the same chance."""

    uniform: ClassVar[bool] = True

    @hookimpl
    def sample(self, server: Server, clients: Sequence[Client], round: int) -> list[int]:
        order = torch.randperm(len(clients), generator=server.sample_stream(round))
        return [clients[place].id for place in order[: server.wanted].tolist()]
