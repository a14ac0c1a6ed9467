"""Named random streams."""

from __future__ import annotations

from hetfl.rng import seed_of


def test_streams_are_named():
    assert seed_of(0, "a", 1, 2) == seed_of(0, "a", 1, 2)
    assert len({seed_of(s, p, r, c) for s in (0, 1) for p in "ab" for r in (0, 1) for c in (0, 1)}) == 16
