"""Ranks and intervals."""

from __future__ import annotations

import math

import pytest

from hetfl.config import resolve
from hetfl.runs import leaderboard
from hetfl.runs.cell import Trial, TrialResult


def trial(extract, point, seed):
    return Trial(point, resolve({"extract": extract, "aggregate": "overlap", "seed": seed}))


def result(extract, point, seed, value):
    return TrialResult(trial(extract, point, seed), "ok", {"global@test": value})


def test_leaderboard():
    one, two = (("alpha", 0.1),), (("alpha", 1.0),)
    rows = [result("a", one, s, v) for s, v in enumerate((0.5, 0.7))] + [result("a", two, 0, 0.4)]
    rows += [result("b", one, s, 0.9) for s in (0, 1)] + [result("b", two, 0, 0.3)]
    refused = TrialResult(trial("c", one, 0), "not applicable", {"why": "no"})
    board = leaderboard.rank_pairs([*rows, refused], "global@test")
    assert [s.extract for s in board] == ["a", "b", "c"]
    assert [s.rank for s in board] == [1.5, 1.5, math.inf]
    mean, std, half, seeds = board[0].values[one]
    assert (mean, std, seeds) == (pytest.approx(0.6), pytest.approx(0.1 * 2**0.5), 2)
    assert half == pytest.approx(12.706 * 0.1 / 1, rel=1e-3)
    assert math.isnan(board[0].values[two].std)
    assert math.isnan(board[0].values[two].half)
    assert board[2].why == "no"


def test_levels_stand_beside_and_results_in_the_order_asked():
    points = [(("alpha", a),) for a in (1.0, 0.1, 0.5)]
    trials = [trial("heterofl", point, 0) for point in points]
    rows = [{"global@test": 0.5, "mean level@test": m, "worst level@test": m - 0.1} for m in (0.4, 0.6, 0.5)]
    results = [TrialResult(t, "ok", row) for t, row in zip(trials, rows, strict=True)]
    assert [r.trial.point for r in leaderboard.sort_results([results[2], results[0], results[1]], trials)] == points
    (row,) = leaderboard.rank_pairs(results, "global@test")
    assert row.levels == {"mean level@test": pytest.approx(0.5), "worst level@test": pytest.approx(0.4)}
    assert leaderboard.csv_rows(row, "global@test")[0]["std"] is not None
