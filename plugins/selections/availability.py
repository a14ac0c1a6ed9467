"""Those that are seldom there come first when they are (after REFL's least available first, Abdelmoniem et al., EuroSys 2023)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from pydantic import PrivateAttr

from hetfl import Client, Plugin, Server, State, hookimpl


class Availability(Plugin):
    """The clients that were there in the fewest rounds so far, ties by chance.

    REFL has clients predict whether they will be there; here the server counts, for a client tells it nothing else.
    """

    _seen: Counter[int] = PrivateAttr(default_factory=Counter)

    @hookimpl
    def sample(self, server: Server, clients: Sequence[Client], round: int) -> list[int]:
        self._seen.update(client.id for client in clients)
        order = torch.randperm(len(clients), generator=server.sample_stream(round)).tolist()
        rarest = sorted((clients[place].id for place in order), key=self._seen.__getitem__)
        return rarest[: server.wanted]

    def state_dict(self) -> State:
        return {"seen": torch.tensor(sorted(self._seen.items()), dtype=torch.int64).reshape(-1, 2)}

    def load_state_dict(self, state: Any) -> None:
        self._seen = Counter(dict(state["seen"].tolist()))
