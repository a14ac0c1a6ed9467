"""Means, intervals and ranks over the runs of a matrix."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetfl.runs.cell import Row, TrialResult
from hetfl.runs.folder import RunFolder

# 97.5 % quantiles of Student's t by degrees of freedom; beyond 30 the normal one's 1.96 is near enough
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101,
     2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


@dataclass(frozen=True)
class LeaderboardRow:
    """A pair over the seeds at each point of the sweep: (mean, half width of the 95 % interval, seeds), and its mean rank."""

    extract: str
    aggregate: str
    values: dict[tuple[tuple[str, Any], ...], tuple[float, float, int]]
    rank: float
    why: str = ""


def leaderboard(outcomes: Sequence[TrialResult], metric: str) -> list[LeaderboardRow]:
    """Every pair by its mean rank over the points of the sweep, by `metric`; pairs without a value come last."""
    grouped: dict[tuple[str, str], dict[Any, list[float]]] = {}
    why: dict[tuple[str, str], str] = {}
    for o in outcomes:
        pair = (o.cell.extract, o.cell.aggregate)
        at = grouped.setdefault(pair, {}).setdefault(o.cell.point, [])
        if o.row.get(metric) is not None:
            at.append(float(o.row[metric]))
        elif o.status != "ok":
            why[pair] = o.row["why"]
    values = {pair: {p: interval(v) for p, v in points.items() if v} for pair, points in grouped.items()}
    ranks = ranked(values)
    rows = [LeaderboardRow(*pair, found, ranks[pair], why.get(pair, "")) for pair, found in values.items()]
    return sorted(rows, key=lambda s: s.rank)


def ranked(values: Mapping[tuple[str, str], Mapping[Any, tuple[float, float, int]]]) -> dict[tuple[str, str], float]:
    """Each pair's mean rank over the points, 1 the best; infinite for a pair without a value."""
    points = {p for found in values.values() for p in found}
    places: dict[tuple[str, str], list[int]] = {pair: [] for pair in values}
    for point in points:
        means = sorted((found[point][0] for found in values.values() if point in found), reverse=True)
        for pair, found in values.items():
            if point in found:
                places[pair].append(1 + means.index(found[point][0]))
    return {pair: statistics.fmean(p) if p else math.inf for pair, p in places.items()}


def interval(values: Sequence[float]) -> tuple[float, float, int]:
    """Mean and half width of the 95 % confidence interval (Student's t); not a number with one value."""
    n = len(values)
    if n < 2:
        return values[0], math.nan, n
    t = T[n - 2] if n - 2 < len(T) else 1.96
    return statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n), n


def write(outcomes: Sequence[TrialResult], metric: str, out: Path) -> None:
    """matrix.csv and matrix.parquet (a row a cell and seed) and leaderboard.csv, each whole or not at all."""
    if not outcomes:
        return
    import io

    import pyarrow
    from pyarrow import parquet

    folder = RunFolder(out)
    rows = [o.row for o in sorted(outcomes, key=lambda o: (o.cell.extract, o.cell.aggregate, str(o.cell.point), o.cell.seed))]
    folder.table("matrix.csv", rows)
    columns = list(dict.fromkeys(name for r in rows for name in r))
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([{name: r.get(name) for name in columns} for r in rows]), buffer)
    folder.write("matrix.parquet", buffer.getvalue())
    folder.table("leaderboard.csv", [line for s in leaderboard(outcomes, metric) for line in lines(s, metric)])


def lines(standing: LeaderboardRow, metric: str) -> list[Row]:
    base = {"extract": standing.extract, "aggregate": standing.aggregate, "mean rank": standing.rank, "metric": metric}
    found = [
        {**base, **dict(point), "mean": mean, "half width of the 95 % interval": half, "seeds": n}
        for point, (mean, half, n) in standing.values.items()
    ]
    return found or [{**base, "why": standing.why}]


def label(point: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in point) or "all"
