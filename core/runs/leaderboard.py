"""Means, intervals and ranks over the runs of a sweep."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetfl.runs.cell import Row, TrialResult
from hetfl.runs.folder import RunFolder

# 97.5 % quantiles of Student's t by degrees of freedom; beyond 30 the normal one's 1.96 is near enough
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101,
     2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


HALF = "half width of the 95 % interval"

Point = tuple[tuple[str, Any], ...]  # what the sweep varies, as (option, value)


@dataclass(frozen=True)
class LeaderboardRow:
    """A pair over the seeds at each point of the sweep: (mean, half width of the 95 % interval, seeds), and its mean rank."""

    extract: str
    aggregate: str
    values: dict[Point, tuple[float, float, int]]
    rank: float
    why: str = ""


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
    spread = {key: interval(values.tolist()) for key, values in table.groupby(["pair", "point"], sort=False)["value"]}
    means = pd.Series({key: mean for key, (mean, _, _) in spread.items()}, dtype=float)
    ranks = means.groupby(level=1).rank(ascending=False, method="min").groupby(level=0).mean() if spread else {}
    lacking = [r for r in results if r.row.get(metric) is None and "why" in r.row]
    why = {(r.trial.extract, r.trial.aggregate): r.row["why"] for r in lacking}
    rows = [
        LeaderboardRow(*pair, {points[p]: found for (q, p), found in spread.items() if q == i},
                       float(ranks.get(i, math.inf)), why.get(pair, ""))
        for i, pair in enumerate(pairs)
    ]  # fmt: skip
    return sorted(rows, key=lambda row: row.rank)


def interval(values: Sequence[float]) -> tuple[float, float, int]:
    """Mean and half width of the 95 % confidence interval (Student's t); not a number with one value."""
    n = len(values)
    if n < 2:
        return values[0], math.nan, n
    t = T[n - 2] if n - 2 < len(T) else 1.96
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n), n


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
    found = [{**base, **dict(point), "mean": mean, HALF: half, "seeds": n} for point, (mean, half, n) in row.values.items()]
    return found or [{**base, "why": row.why}]


def point_label(point: Sequence[tuple[str, Any]]) -> str:
    """A point of the sweep in words, e.g. `alpha 0.1, lr 0.05`."""
    return ", ".join(f"{name} {value}" for name, value in point) or "all"
