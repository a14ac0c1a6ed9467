"""Amounts and ratios as they are written."""

from __future__ import annotations

from hetfl.profiling import capacity


def test_quantities():
    assert [capacity.quantity(t) for t in ("256MB", "1.5 GB", "20M", "3e3", "7k")] == [256e6, 1.5e9, 20e6, 3e3, 7e3]
    assert [capacity.ratio(t) for t in ("0.5", "1/4", "0.75^2")] == [0.5, 0.25, 0.5625]
