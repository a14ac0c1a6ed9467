"""Replies fetched from a Flower grid, so that one that cannot be fetched keeps no other waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait

from flwr.app import Message
from flwr.serverapp import Grid

GROUPS = 16  # fetched at once
LOOK = 2.0  # seconds that a look waits for what it fetches; longer transfers go on behind it


class Fetcher:
    """Fetches replies in groups, each in a thread of its own.

    A node that dies amid its upload leaves a reply of which parts are missing. Flower's grid waits three minutes for these, and so
    does whoever asked for it.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._fetches: list[tuple[Future[list[Message]], Sequence[str]]] = []
        self._found: dict[str, Message] = {}
        self._forgotten: set[str] = set()  # of those under way

    def look(self, ids: Sequence[str]) -> list[Message]:
        """The replies to the messages `ids` that are here by now."""
        asked = {id for _, group in self._fetches for id in group} | self._found.keys()
        free = [id for id in ids if id not in asked]
        begun = [(self._fetch(group), group) for group in (free[i::GROUPS] for i in range(min(GROUPS, len(free))))]
        wait([fetch for fetch, _ in begun], LOOK)
        self._fetches += begun
        for fetch, _ in (ended := [pair for pair in self._fetches if pair[0].done()]):
            self._found |= {reply.metadata.reply_to_message_id: reply for reply in fetch.result()}
        self._fetches = [pair for pair in self._fetches if pair not in ended]
        self.forget(self._forgotten)
        return [self._found.pop(id) for id in ids if id in self._found]

    def forget(self, ids: Iterable[str]) -> None:
        """Keeps no reply to the messages `ids`, for which nobody will look."""
        wanted = {*ids}
        self._forgotten = wanted.intersection(id for _, group in self._fetches for id in group) | (self._forgotten - wanted)
        self._found = {id: reply for id, reply in self._found.items() if id not in wanted}

    def _fetch(self, ids: Sequence[str]) -> Future[list[Message]]:
        """What the grid has of the replies, in a thread that does not keep this process from ending."""
        fetch = Future[list[Message]]()

        def work() -> None:
            try:
                fetch.set_result(list(self._grid.pull_messages(ids)))
            except BaseException as error:
                fetch.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return fetch
