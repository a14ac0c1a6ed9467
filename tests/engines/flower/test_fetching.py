"""Replies of a grid of which one cannot be fetched."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from hetfl.engines.flower import fetching


class Torn:
    """A grid that waits for the rest of the reply to message "torn" until it is told that this is given up."""

    def __init__(self):
        self.given_up, self.asked = threading.Event(), []

    def pull_messages(self, ids):
        self.asked += ids
        if "torn" in ids:
            self.given_up.wait(20)
        return [SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=id)) for id in ids if id != "later"]


def test_a_reply_that_cannot_be_fetched_keeps_no_other_waiting(monkeypatch):
    monkeypatch.setattr(fetching, "LOOK", 0.05)
    grid = Torn()
    fetcher = fetching.Fetcher(grid)

    def look(*ids):
        return [reply.metadata.reply_to_message_id for reply in fetcher.look(ids)]

    assert look("one", "torn", "later") == ["one"]
    assert look("torn", "later") == []
    assert grid.asked.count("torn") == 1, "it is being fetched"
    assert grid.asked.count("later") == 2
    grid.given_up.set()
    fetching.wait([fetch for fetch, _ in fetcher._fetches], 20)
    assert look("others") == ["others"], "whoever looks for its own leaves the rest to others"
    assert look("torn") == ["torn"]


def test_a_reply_for_which_nobody_looks_any_more_is_not_kept(monkeypatch):
    monkeypatch.setattr(fetching, "LOOK", 0.05)
    grid = Torn()
    fetcher = fetching.Fetcher(grid)
    assert not fetcher.look(["torn"])
    fetcher.forget(["torn", "never seen"])
    assert not fetcher.look(["later"])
    grid.given_up.set()
    fetching.wait([fetch for fetch, _ in fetcher._fetches], 20)
    assert len(fetcher.look(["other"])) == 1
    assert not fetcher._found
    assert not fetcher._forgotten


def test_what_the_grid_raises_is_raised():
    fetcher = fetching.Fetcher(SimpleNamespace(pull_messages=lambda ids: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        fetcher.look(["a"])
