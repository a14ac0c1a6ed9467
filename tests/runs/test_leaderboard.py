"""Ranks and intervals."""

from __future__ import annotations

import math

import pytest

from hetfl.config import resolve
from hetfl.runs import cell as matrix
from hetfl.runs import leaderboard


def cell(extract, point, seed):
    return matrix.Trial(point, resolve({"extract": extract, "aggregate": "overlap", "seed": seed}))


def outcome(extract, point, seed, value):
    return matrix.TrialResult(cell(extract, point, seed), "ok", {"global@test": value})


def test_leaderboard():
    one, two = (("alpha", 0.1),), (("alpha", 1.0),)
    rows = [outcome("a", one, s, v) for s, v in enumerate((0.5, 0.7))] + [outcome("a", two, 0, 0.4)]
    rows += [outcome("b", one, s, 0.9) for s in (0, 1)] + [outcome("b", two, 0, 0.3)]
    refused = matrix.TrialResult(cell("c", one, 0), "not applicable", {"why": "no"})
    board = leaderboard.leaderboard([*rows, refused], "global@test")
    assert [s.extract for s in board] == ["a", "b", "c"]
    assert [s.rank for s in board] == [1.5, 1.5, math.inf]
    mean, half, seeds = board[0].values[one]
    assert (mean, seeds) == (pytest.approx(0.6), 2)
    assert half == pytest.approx(12.706 * 0.1 / 1, rel=1e-3)
    assert math.isnan(board[0].values[two][1])
    assert board[2].why == "no"
