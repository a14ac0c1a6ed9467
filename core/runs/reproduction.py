"""Published tables as data, and our runs of their rows beside what is printed there."""

from __future__ import annotations

import statistics
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from hetfl.config import merge_options, resolve
from hetfl.errors import UsageError, nearest, unknown
from hetfl.files import find_resource
from hetfl.presets import find_preset
from hetfl.runs.cell import Row, Trial, TrialResult
from hetfl.runs.sweep import read_result, run_trials

PATH = find_resource("plugins/tables.toml", "plugins/tables.toml")
MEGABYTES = "MB"  # a value of a row beside its accuracies: what all clients were sent and sent in all rounds


@dataclass(frozen=True, eq=False)
class TableRow:
    """One row of a published table: the run that stands for it, and its values.

    `published` and `others` (by who measured) hold accuracies in percent and megabytes by metric. `unlike` says what our run does
    otherwise than the paper's; `disputed` why the printed value is not believed; `minutes` what one seed took here.
    """

    table: str
    name: str
    options: dict[str, Any]
    published: dict[str, float]
    others: dict[str, dict[str, float]] = field(default_factory=dict)
    band: float = 1.0
    seeds: int = 3
    minutes: float | None = None
    unlike: str = ""
    disputed: str = ""

    def trials(self, seeds: int | None = None, **more: Any) -> list[Trial]:
        """The runs of this row, by seed; `more` are options of the run that change no setting of the paper's (device, say)."""
        return [
            Trial((("row", self.name),), resolve(merge_options(self.options, {**more, "seed": seed})))
            for seed in range(seeds or self.seeds)
        ]


@dataclass(frozen=True)
class PaperTable:
    """A published table; `band` is how far from the printed value ours may be, in points, and `band_from` where that comes from."""

    name: str
    paper: str
    about: str
    source: str
    band: float
    band_from: str
    rows: tuple[TableRow, ...]


@dataclass(frozen=True)
class Score:
    """One printed value beside ours: the mean and the standard deviation over `seeds` runs (None and 0 where there is none)."""

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
        """Whether ours is within the band of what is printed, or why there is nothing to say."""
        if self.mean is None:
            return "not run"
        gap = self.mean - self.published
        if abs(gap) <= self.row.band * (self.published / 100 if self.metric == MEGABYTES else 1):
            return "yes"
        return f"no ({gap:+.1f})"


@cache
def tables() -> dict[str, PaperTable]:
    """The tables by name: the built-in ones, and those of installed packages that name themselves under `hetfl.tables`.

    Such a package holds a file tables.toml of the same form as plugins/tables.toml. Raises UsageError for two of one name.
    """
    found: dict[str, PaperTable] = {}
    texts = [PATH.read_text(encoding="utf-8")]
    texts += [(resources.files(point.value) / "tables.toml").read_text("utf-8") for point in entry_points(group="hetfl.tables")]
    for text in texts:
        for name, values in tomllib.loads(text).items():
            if name in found:
                raise UsageError(f"two tables bear the name '{name}'; uninstall one of their packages")
            found[name] = read_table(name, values)
    return found


def read_table(name: str, values: Mapping[str, Any]) -> PaperTable:
    """A table from its TOML: each row is a preset, with `options` over it, and has the table's values where it names none."""
    common = {key: values[key] for key in ("band", "seeds", "unlike") if key in values}
    rows = tuple(read_row(name, {**common, **row}) for row in values["rows"])
    return PaperTable(
        name, values["paper"], values["about"], values["source"], values.get("band", 1.0), values.get("band_from", ""), rows
    )


def read_row(table: str, values: Mapping[str, Any]) -> TableRow:
    """A row from its TOML; what its preset says to be unlike the paper is said of it too. With `set = {}`
    it has none of the preset's options of plugins."""
    given = dict(values)
    options, unlike = given.pop("options", {}), [given.pop("unlike", "")]
    if "preset" in given:
        preset = find_preset(given.pop("preset"))
        kept = {name: value for name, value in preset.values.items() if name != "set" or options.get("set") != {}}
        options, unlike = merge_options({**kept, "preset": preset.name}, options), [*unlike, preset.unlike]
    return TableRow(table, given.pop("name"), options, unlike="; ".join(dict.fromkeys(filter(None, unlike))), **given)


def find_rows(table: str | None, names: Sequence[str]) -> list[TableRow]:
    """The rows of a table, or of all: those of the names given, or, where no row has such a name, those with it in theirs.

    Raises UsageError where there is no such table or row.
    """
    if table is not None and table not in tables():
        raise unknown("table", table, set(tables()))
    rows = [row for t in tables().values() if table in (None, t.name) for row in t.rows]
    chosen = list[TableRow]()
    for name in names:
        found = [row for row in rows if row.name == name] or [row for row in rows if name.lower() in row.name.lower()]
        if not found:
            known = dict.fromkeys(row.name for row in rows)
            raise UsageError(f"no row is called '{name}'{nearest(name, known)} (hfl reproduce --list shows them)")
        chosen += found
    return list(dict.fromkeys(chosen)) if names else rows


def run_rows(
    rows: Sequence[TableRow], out: Path, jobs: int, plan: Callable[[TableRow], list[Trial]], budget: float | None
) -> Iterator[TrialResult]:
    """Runs what `out` does not hold yet, and yields every run's result.

    With a `budget` in seconds the cheapest rows come first, and none is begun that would not end in what is left of it, by what it
    took here; a row of unknown cost is begun while anything is left.
    """
    if budget is None:
        yield from run_trials([trial for row in rows for trial in plan(row)], out, jobs)
        return
    end = time.monotonic() + budget
    for row in sorted(rows, key=lambda row: row.minutes or 0.0):
        trials = plan(row)
        new = sum(read_result(out, trial) is None for trial in trials)
        if new and time.monotonic() + 60 * (row.minutes or 0.0) * -(-new // jobs) > end:
            continue
        yield from run_trials(trials, out, jobs)


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


def score_lines(scores: Sequence[Score], device: str) -> list[Row]:
    """The lines of scorecard.csv."""
    return [
        {
            "table": s.row.table, "row": s.row.name, "metric": s.metric, "paper": s.published,
            "others": "; ".join(f"{who} {value:g}" for who, value in s.others.items()),
            "ours": None if s.mean is None else round(s.mean, 2), "std": None if s.std is None else round(s.std, 2),
            "seeds": s.seeds, "band": s.row.band, "within": s.verdict, "device": device,
            "seconds": None if s.seconds is None else round(s.seconds, 1), "unlike": s.row.unlike, "disputed": s.row.disputed,
        }
        for s in scores
    ]  # fmt: skip
