"""Means, intervals and ranks over the runs of a sweep."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hetfl.rounds.rows import MEAN_LEVEL, WORST_LEVEL
from hetfl.runs.cell import Row, Trial, TrialResult
from hetfl.runs.folder import RunFolder

# 97.5 % quantiles of Student's t by degrees of freedom; beyond 30 the normal one's 1.96 is near enough
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101,
     2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


HALF = "half width of the 95 % interval"

Point = tuple[tuple[str, Any], ...]  # what the sweep varies, as (option, value)


class Spread(NamedTuple):
    """Values of several seeds: mean, standard deviation, half width of the 95 % interval (Student's t), number of seeds.

    With one value neither deviation nor interval is a number.
    """

    mean: float
    std: float
    half: float
    seeds: int


@dataclass(frozen=True)
class LeaderboardRow:
    """A pair over the seeds at each point of the sweep, its mean rank, and its accuracies by level: MEAN_LEVEL and WORST_LEVEL."""

    extract: str
    aggregate: str
    values: dict[Point, Spread]
    rank: float
    why: str = ""
    levels: dict[str, float] = field(default_factory=dict)


def rank_pairs(results: Sequence[TrialResult], metric: str) -> list[LeaderboardRow]:
    """Every pair by its mean rank over the points of the sweep, by `metric`; pairs without a value come last.

    At each point the pair with the highest mean over the seeds has rank 1, and equal means have the same rank.
    """
    import pandas as pd

    pairs = list(dict.fromkeys((r.trial.extract, r.trial.aggregate) for r in results))
    points = list(dict.fromkeys(r.trial.point for r in results))
    measured = [
        (pairs.index((r.trial.extract, r.trial.aggregate)), points.index(r.trial.point), float(r.row[metric]))
        for r in results
        if r.row.get(metric) is not None
    ]
    table = pd.DataFrame(measured, columns=["pair", "point", "value"])
    spread = {key: measure_spread(values.tolist()) for key, values in table.groupby(["pair", "point"], sort=False)["value"]}
    means = pd.Series({key: found.mean for key, found in spread.items()}, dtype=float)
    ranks = means.groupby(level=1).rank(ascending=False, method="min").groupby(level=0).mean() if spread else {}
    lacking = [r for r in results if r.row.get(metric) is None and "why" in r.row]
    why = {(r.trial.extract, r.trial.aggregate): r.row["why"] for r in lacking}
    rows = [
        LeaderboardRow(*pair, {points[p]: found for (q, p), found in spread.items() if q == i},
                       float(ranks.get(i, math.inf)), why.get(pair, ""), average_levels(pair, results))
        for i, pair in enumerate(pairs)
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row.rank)


def average_levels(pair: tuple[str, str], results: Sequence[TrialResult]) -> dict[str, float]:
    """A pair's mean and worst level, the means over its runs."""
    mine = [r.row for r in results if (r.trial.extract, r.trial.aggregate) == pair]
    found = {name: [row[name] for row in mine if row.get(name) is not None] for name in (MEAN_LEVEL, WORST_LEVEL)}
    return {name: statistics.fmean(values) for name, values in found.items() if values}


def measure_spread(values: Sequence[float]) -> Spread:
    """What the values of several seeds come to."""
    n = len(values)
    if n < 2:
        return Spread(values[0], math.nan, math.nan, n)
    std = statistics.stdev(values)
    return Spread(statistics.fmean(values), std, quantile(n - 1) * std / math.sqrt(n), n)


def quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t with so many degrees of freedom."""
    return T[freedom - 1] if freedom <= len(T) else 1.96


def write_tables(results: Sequence[TrialResult], metric: str, out: Path) -> None:
    """Writes matrix.csv and matrix.parquet (a row a trial) and leaderboard.csv, each whole or not at all."""
    if not results:
        return
    import io

    import pyarrow
    from pyarrow import parquet

    folder = RunFolder(out)
    by_name = sorted(results, key=lambda r: (r.trial.extract, r.trial.aggregate, str(r.trial.point), r.trial.seed))
    rows = [r.row for r in by_name]
    folder.table("matrix.csv", rows)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([{name: row.get(name) for name in columns} for row in rows]), buffer)
    folder.write("matrix.parquet", buffer.getvalue())
    folder.table("leaderboard.csv", [line for row in rank_pairs(results, metric) for line in csv_rows(row, metric)])


def csv_rows(row: LeaderboardRow, metric: str) -> list[Row]:
    """The lines of leaderboard.csv for one pair: one a point, or one that says why it has no value."""
    base = {"extract": row.extract, "aggregate": row.aggregate, "mean rank": row.rank, "metric": metric}
    found = [
        {**base, **dict(point), "mean": mean, "std": std, HALF: half, "seeds": n, **row.levels}
        for point, (mean, std, half, n) in row.values.items()
    ]
    return found or [{**base, "why": row.why}]


def sort_results(results: Sequence[TrialResult], trials: Sequence[Trial]) -> list[TrialResult]:
    """The results in the order in which their trials were asked for."""
    places = {(trial.name, repr(trial.point)): i for i, trial in enumerate(trials)}
    return sorted(results, key=lambda result: places.get((result.trial.name, repr(result.trial.point)), len(trials)))


def point_label(point: Sequence[tuple[str, Any]]) -> str:
    """A point of the sweep in words, e.g. `alpha 0.1, lr 0.05`."""
    return ", ".join(f"{name} {value}" for name, value in point) or "all"
