"""What everything else stands on: files written whole or not at all, a cache for each thread."""

from __future__ import annotations

import threading

import pytest

from hetfl.files import replace_file, write_file
from hetfl.parallel import ThreadCache


def write_half(draft):
    draft.write_bytes(b"ne")
    raise OSError("full")


def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_file(path, b"old")
    with pytest.raises(OSError, match="full"), replace_file(path) as draft:
        write_half(draft)
    assert path.read_bytes() == b"old"
    with replace_file(path) as one, replace_file(path) as two:
        one.write_bytes(b"one")
        two.write_bytes(b"two")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_thread_keeps_what_it_used_last_and_shares_nothing():
    cache, built = ThreadCache(2), []

    def get(key):
        return cache.get(key, lambda: built.append(key) or [key])

    first = get("a")
    assert get("b") is not first
    assert get("a") is first
    get("c")  # "b" is the least recently used
    assert get("a") is first
    get("b")
    assert built == ["a", "b", "c", "b"]
    found = []
    thread = threading.Thread(target=lambda: found.append(get("a")))
    thread.start()
    thread.join()
    assert found == [["a"]]
    assert found[0] is not first
