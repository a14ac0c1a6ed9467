"""Our runs of the rows of published tables, beside what is printed there."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hetfl.errors import UsageError
from hetfl.runs.cell import Row, Trial, TrialResult
from hetfl.runs.checkpoint import count_rounds
from hetfl.runs.folder import RunFolder, plain_cell
from hetfl.runs.sweep import has_ended, read_result, refuse_bad, run_trials
from hetfl.runs.tables import MEGABYTES, TableRow, saying

SCORECARD = "scorecard.csv"

KEYS = ("table", "row", "metric", "device")  # of a line of it


@dataclass(frozen=True)
class Score:
    """One printed value beside ours: the mean and the standard deviation over `seeds` runs (None and 0 where there is none).

    `seconds` is what one of the runs that ended took, None where none did; `absent` why there is no value of ours.
    """

    row: TableRow
    metric: str
    published: float
    others: dict[str, float]
    mean: float | None
    std: float | None
    seeds: int
    seconds: float | None = None
    absent: str = "not run"

    @property
    def verdict(self) -> str:
        """Whether ours is within the band of what is printed, or why there is nothing to say; nothing where there is no band."""
        if self.mean is None:
            return self.absent
        band, gap = self.row.find_band(self.metric), round(round(self.mean, 2) - self.published, 2)
        if band is None:
            return ""
        most, unit = (band * self.published / 100, " MB") if self.metric == MEGABYTES else (band, "")
        digits = 1 if round(abs(gap), 1) > most else 2
        return "yes" if abs(gap) <= most else f"no ({gap:+.{digits}f}{unit})"


def run_rows(
    rows: Sequence[TableRow], out: Path, jobs: int, plan: Callable[[TableRow], list[Trial]], budget: float | None
) -> Iterator[TrialResult]:
    """Runs what `out` does not hold yet, and yields every run's result.

    With a `budget` in seconds the cheapest rows come first, and none is begun that would not end in what is left of it, by what its
    runs took. Rows of unknown cost come last, and are begun run by run while anything is left. What runs at its end is stopped.
    """
    if budget is None:
        yield from run_trials([trial for row in rows for trial in plan(row)], out, jobs)
        return
    end = time.monotonic() + budget
    for row in sorted(rows, key=lambda row: find_cost(out, row, plan) or math.inf):
        new = [trial for trial in plan(row) if not has_ended(out, trial)]
        yield from run_trials([trial for trial in plan(row) if has_ended(out, trial)], out, jobs)
        while new and (left := end - time.monotonic()) > 0:
            cost = find_cost(out, row, plan)
            if cost is not None and estimate_seconds(out, new, cost, jobs) > left:
                break
            now = new if cost is not None else new[:jobs]
            yield from run_trials(now, out, jobs, until=end)
            new = new[len(now) :]


def estimate_seconds(out: Path, trials: Sequence[Trial], cost: float, jobs: int) -> float:
    """What is left of `trials` that take `cost` seconds each from their beginning, `jobs` at a time."""
    left = [cost * share_left(out, trial) for trial in trials]
    return sum(max(left[begin : begin + jobs]) for begin in range(0, len(left), jobs))


def share_left(out: Path, trial: Trial) -> float:
    """How much of a trial is still to be run, from 1 to 0: of its rounds, those after its last checkpoint in `out`."""
    if has_ended(out, trial):
        return 0.0
    return 1 - count_rounds(out / "cells" / trial.name / "checkpoints") / trial.options.rounds


def find_bad(rows: Sequence[TableRow], plan: Callable[[TableRow], list[Trial]]) -> dict[TableRow, UsageError]:
    """The rows that no run could be made of, and what is wrong with each."""
    found = {}
    for row in rows:
        try:
            with saying(f"table '{row.table}': row '{row.name}'"):
                refuse_bad(plan(row)[:1])
        except UsageError as error:
            found[row] = error
    return found


def find_cost(out: Path, row: TableRow, plan: Callable[[TableRow], list[Trial]]) -> float | None:
    """Seconds of one run of a row: of those in `out`, else as its table says; None where that is not known."""
    took = [found.row["seconds"] for trial in plan(row) if (found := read_result(out, trial)) is not None and found.status == "ok"]
    return statistics.fmean(took) if took else None if row.minutes is None else 60 * row.minutes


def score_rows(rows: Sequence[TableRow], out: Path, plan: Callable[[TableRow], list[Trial]]) -> list[Score]:
    """Every printed value of the rows beside what the runs in `out` came to."""
    return [score for row in rows for score in score_row(row, read_runs(out, plan(row)))]


def read_runs(out: Path, trials: Sequence[Trial]) -> list[TrialResult | None]:
    """What `out` holds of a row's `trials`, and of higher seeds that ended there earlier."""
    found, options = [read_result(out, trial) for trial in trials], trials[-1].options
    while True:
        options = options.model_copy(update={"seed": options.seed + 1})
        result = read_result(out, replace(trials[-1], options=options))
        if result is None or result.status != "ok":
            return found
        found.append(result)


def score_row(row: TableRow, results: Sequence[TrialResult | None]) -> list[Score]:
    """A row's printed values beside the means over its runs that ended."""
    done = [result.row for result in results if result is not None and result.status == "ok"]
    seconds = statistics.fmean(r["seconds"] for r in done) if done else None
    ends = [result.status for result in results if result is not None]
    absent = "not measured" if done else next(iter(ends), "not run")
    scores = []
    for metric, published in row.published.items():
        ours = [value for r in done if (value := value_of(r, metric)) is not None]
        others = {who: values[metric] for who, values in row.others.items() if metric in values}
        mean = statistics.fmean(ours) if ours else None
        std = statistics.stdev(ours) if len(ours) > 1 else None
        scores.append(Score(row, metric, published, others, mean, std, len(ours), seconds, absent))
    return scores


def value_of(result: Row, metric: str) -> float | None:
    """A value of a run in the tables' units: percent, or megabytes."""
    if metric == MEGABYTES:
        return float(result["bytes down"] + result["bytes up"]) / 1e6
    return None if result.get(metric) is None else 100 * float(result[metric])


def write_scorecard(scores: Sequence[Score], device: str, out: Path) -> None:
    """Writes scorecard.csv. What an earlier command left there of other rows, or of another device, stays, and so does a value of
    ours that has no new one. Raises UsageError where something else has that name."""
    folder, new = RunFolder(out), {key_of(line): line for line in score_lines(scores, device)}
    old = {key_of(line): line for line in read_scorecard(folder)}
    kept = {key: line for key, line in old.items() if line.get("ours") and key in new and new[key]["ours"] is None}
    folder.table(SCORECARD, [*({**old, **new, **kept}).values()])


def read_scorecard(folder: RunFolder) -> list[dict[str, str]]:
    """The lines of scorecard.csv, if there is one. Raises UsageError for a file of that name that is none."""
    path = folder.path / SCORECARD
    if not folder.holds(SCORECARD):
        return []
    lines = [{}] if path.is_dir() else folder.rows(SCORECARD)
    if any(not line.keys() >= {*KEYS} for line in lines):
        raise UsageError(f"'{path}' is no scorecard of hfl reproduce; choose another --out")
    return lines


def key_of(line: Mapping[str, Any]) -> tuple[Any, ...]:
    """What makes a line of scorecard.csv another one, as its cells have it."""
    return tuple(plain_cell(line[name]) for name in KEYS)


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
