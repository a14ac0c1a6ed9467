"""What everything else stands on: files written whole or not at all."""

from __future__ import annotations

import pytest

from hetfl.files import replace_file, write_file


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
