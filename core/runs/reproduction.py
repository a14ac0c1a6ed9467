"""Our runs of the rows of published tables, beside what is printed there."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetfl.runs.cell import Row, Trial, TrialResult
from hetfl.runs.folder import RunFolder
from hetfl.runs.sweep import has_ended, read_result, run_trials
from hetfl.runs.tables import MEGABYTES, TableRow

SCORECARD = "scorecard.csv"


@dataclass(frozen=True)
class Score:
    """One printed value beside ours: the mean and the standard deviation over `seeds` runs (None and 0 where there is none).

    `seconds` is what one of the runs that ended took; None where none did.
    """

    row: TableRow
    metric: str
    published: float
    others: dict[str, float]
    mean: float | None
    std: float | None
    seeds: int
    seconds: float | None = None

    @property
    def verdict(self) -> str:
        """Whether ours is within the band of what is printed, or why there is nothing to say; nothing where there is no band."""
        if self.mean is None:
            return "not run" if self.seconds is None else "not measured"
        band, gap = self.row.find_band(self.metric), self.mean - self.published
        if band is None:
            return ""
        return "yes" if abs(gap) <= band * (self.published / 100 if self.metric == MEGABYTES else 1) else f"no ({gap:+.1f})"


def run_rows(
    rows: Sequence[TableRow], out: Path, jobs: int, plan: Callable[[TableRow], list[Trial]], budget: float | None
) -> Iterator[TrialResult]:
    """Runs what `out` does not hold yet, and yields every run's result.

    With a `budget` in seconds the cheapest rows come first, and none is begun that would not end in what is left of it, by what its
    runs took. Rows of unknown cost come last, and are begun run by run while anything is left.
    """
    if budget is None:
        yield from run_trials([trial for row in rows for trial in plan(row)], out, jobs)
        return
    end = time.monotonic() + budget
    for row in sorted(rows, key=lambda row: find_cost(out, row, plan) or math.inf):
        new = [trial for trial in plan(row) if not has_ended(out, trial)]
        yield from run_trials([trial for trial in plan(row) if has_ended(out, trial)], out, jobs)
        while new and time.monotonic() < end:
            cost = find_cost(out, row, plan)
            if cost is not None and time.monotonic() + cost * math.ceil(len(new) / jobs) > end:
                break
            now = new if cost is not None else new[:jobs]
            yield from run_trials(now, out, jobs)
            new = new[len(now) :]


def find_cost(out: Path, row: TableRow, plan: Callable[[TableRow], list[Trial]]) -> float | None:
    """Seconds of one run of a row: of those in `out`, else as its table says; None where that is not known."""
    took = [found.row["seconds"] for trial in plan(row) if (found := read_result(out, trial)) is not None and found.status == "ok"]
    return statistics.fmean(took) if took else None if row.minutes is None else 60 * row.minutes


def score_rows(rows: Sequence[TableRow], out: Path, plan: Callable[[TableRow], list[Trial]]) -> list[Score]:
    """Every printed value of the rows beside what the runs in `out` came to."""
    return [score for row in rows for score in score_row(row, [read_result(out, trial) for trial in plan(row)])]


def score_row(row: TableRow, results: Sequence[TrialResult | None]) -> list[Score]:
    """A row's printed values beside the means over its runs that ended."""
    done = [result.row for result in results if result is not None and result.status == "ok"]
    seconds = statistics.fmean(r["seconds"] for r in done) if done else None
    scores = []
    for metric, published in row.published.items():
        ours = [value for r in done if (value := value_of(r, metric)) is not None]
        others = {who: values[metric] for who, values in row.others.items() if metric in values}
        mean = statistics.fmean(ours) if ours else None
        std = statistics.stdev(ours) if len(ours) > 1 else None
        scores.append(Score(row, metric, published, others, mean, std, len(ours), seconds))
    return scores


def value_of(result: Row, metric: str) -> float | None:
    """A value of a run in the tables' units: percent, or megabytes."""
    if metric == MEGABYTES:
        return float(result["bytes down"] + result["bytes up"]) / 1e6
    return None if result.get(metric) is None else 100 * float(result[metric])


def write_scorecard(scores: Sequence[Score], device: str, out: Path) -> None:
    """Writes scorecard.csv. What an earlier command left there of other rows, or of another device, stays."""
    folder, new = RunFolder(out), {key_of(line): line for line in score_lines(scores, device)}
    old = {key_of(line): line for line in folder.rows(SCORECARD)} if folder.holds(SCORECARD) else {}
    folder.table(SCORECARD, [*({**old, **new}).values()])


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a line of scorecard.csv another one."""
    return tuple(line.get(name) for name in ("table", "row", "metric", "device"))


def score_lines(scores: Sequence[Score], device: str) -> list[Row]:
    """The lines of scorecard.csv."""
    return [
        {
            "table": s.row.table, "row": s.row.name, "metric": s.metric, "paper": s.published,
            "others": "; ".join(f"{who} {value:g}" for who, value in s.others.items()),
            "ours": None if s.mean is None else round(s.mean, 2), "std": None if s.std is None else round(s.std, 2),
            "seeds": s.seeds, "band": s.row.find_band(s.metric), "within": s.verdict, "device": device,
            "seconds": None if s.seconds is None else round(s.seconds, 1), "unlike": "; ".join(s.row.unlike),
            "disputed": s.row.disputed,
        }
        for s in scores
    ]  # fmt: skip
