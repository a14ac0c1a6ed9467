"""Oort: clients with much to learn from and little to wait for (Lai et al., OSDI 2021, algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from hetfl import Client, Field, Plugin, Server, hookimpl


class Oort(Plugin):
    """Explores clients that it has not heard of, and takes of the others by utility: examples x loss, lowered for slow ones.

    Utility has a bonus sqrt(0.1 ln(round) / round of its last reply), and a factor (preferred / seconds)^alpha for clients slower
    than the preferred duration. Clients are drawn by utility from those above `cutoff` times that of the last one wanted. Unlike
    the paper: the loss is that of the last batch, for no other is sent; unknown clients are drawn uniformly, not by speed; the
    preferred duration is a quantile of the known ones, not paced. Without --fleet all clients are equally fast.
    """

    explore: float = Field(0.9, ge=0, le=1, description="share of clients that are explored in round 1")
    decay: float = Field(0.98, gt=0, le=1, description="factor on that share after every round")
    least: float = Field(0.2, ge=0, le=1, description="least share that is explored")
    alpha: float = Field(2.0, ge=0, description="how much slow clients are marked down")
    preferred: float = Field(0.5, gt=0, le=1, description="quantile of the known clients' seconds beyond which a client is slow")
    cutoff: float = Field(0.95, gt=0, le=1, description="share of the utility of the last one wanted that is still taken")

    @hookimpl
    def sample(self, server: Server, clients: Sequence[Client], round: int) -> list[int]:
        known, generator = [c for c in clients if "loss" in c.last], server.sample_stream(round)
        fresh, share = [c.id for c in clients if "loss" not in c.last], max(self.least, self.explore * self.decay ** (round - 1))
        exploited = min(len(known), max(server.wanted - len(fresh), server.wanted - int(share * server.wanted)))
        unheard = [fresh[place] for place in torch.randperm(len(fresh), generator=generator).tolist()]
        return self._exploit(known, exploited, round, generator) + unheard[: server.wanted - exploited]

    def _exploit(self, known: Sequence[Client], wanted: int, round: int, generator: torch.Generator) -> list[int]:
        """`wanted` of the known clients by their utility."""
        if not wanted:
            return []
        utility = dict(sorted(self.score(known, round).items(), key=lambda item: (-item[1], item[0])))
        bar = self.cutoff * list(utility.values())[wanted - 1]
        able = [client for client, value in utility.items() if value >= bar]
        chances = torch.tensor([utility[client] for client in able], dtype=torch.float64).clamp(min=1e-12)
        return [able[place] for place in torch.multinomial(chances, wanted, generator=generator).tolist()]

    def score(self, known: Sequence[Client], round: int) -> dict[int, float]:
        """The utility of each client."""
        seconds = {c.id: float(c.last.get("simulated seconds", 1.0)) for c in known}
        bound = sorted(seconds.values())[math.ceil(self.preferred * len(known)) - 1]
        return {
            c.id: (c.last["examples"] * c.last["loss"] + math.sqrt(0.1 * math.log(round) / max(c.last_round, 1)))
            * min(1.0, bound / max(seconds[c.id], 1e-9)) ** self.alpha
            for c in known
        }
