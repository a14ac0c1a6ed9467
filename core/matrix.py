"""Many runs as one experiment: the cells of a matrix, their cache, their table and what it comes to over seeds."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hetfl.core import config, registry
from hetfl.core.config import RunOptions
from hetfl.core.errors import NotApplicable, RunError, UsageError, unknown
from hetfl.core.record import Folder

IDLE = {"out", "overwrite", "workers"}  # options that change no result
FIXED = {"extract", "aggregate", "seed", *IDLE}  # and those that a matrix has options of its own for
# 97.5 % quantiles of Student's t by degrees of freedom; beyond 30 the normal one's 1.96 is near enough
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101,
     2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run: what the matrix varies in it beside pair and seed (`point`), and the whole of its options."""

    point: tuple[tuple[str, Any], ...]
    options: RunOptions

    @property
    def extract(self) -> str:
        return self.options.extract

    @property
    def aggregate(self) -> str:
        return self.options.aggregate or natural(self.extract)

    @property
    def seed(self) -> int:
        return self.options.seed

    @property
    def key(self) -> str:
        """A hash of all that its result depends on."""
        values = self.options.model_dump(mode="json", exclude=IDLE)
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        return f"{self.extract}-{self.aggregate}-{self.key}"


Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a cell: "ok", "not applicable" or "failed", its row, and why where it is not ok."""

    cell: Cell
    status: str
    row: Row = field(default_factory=dict)
    cached: bool = False


def pairs(extract: Sequence[str], aggregate: Sequence[str]) -> list[tuple[str, str]]:
    """The cross product, `all` and `natural` spelt out, with the controls behind it."""
    known = registry.entries("extract")
    names = [e.name for e in known if not e.control] if list(extract) == ["all"] else list(extract)
    partners = [e.name for e in registry.entries("aggregate")] if list(aggregate) == ["all"] else list(aggregate)
    found = [(e, natural(e) if a == "natural" else registry.find("aggregate", a).name) for e in names for a in partners]
    return list(dict.fromkeys([*found, *((e.name, natural(e.name)) for e in known if e.control)]))


def natural(extract: str) -> str:
    return registry.find("extract", extract).aggregate or "overlap"


def cells(
    base: Mapping[str, Any], pairs: Sequence[tuple[str, str]], sweep: Mapping[str, Sequence[Any]], seeds: Sequence[int]
) -> list[Cell]:
    """Every pair at every point of the sweep with every seed. Raises UsageError for options that no run could have."""
    found = []
    for (extract, aggregate), values in itertools.product(pairs, itertools.product(*sweep.values())):
        point = tuple(zip(sweep, values, strict=True))
        for seed in seeds:
            options = {**base, "extract": extract, "aggregate": aggregate, "seed": seed}
            for name, value in point:
                put(options, name, value)
            options["set"] = relevant(options.get("set", {}), extract, aggregate, str(base.get("profile", "levels")))
            found.append(Cell(point, config.resolve({k: v for k, v in options.items() if v is not None})))
    return found


def put(options: dict[str, Any], name: str, value: Any) -> None:
    """Sets a swept option: one of the run (also as data.public, train.lr …), or plugin.option."""
    group, _, rest = name.partition(".")
    plain = {"public": "server_data"}.get(rest, rest) if group in ("data", "train", "server", "run") else name.replace("-", "_")
    if plain in FIXED:
        raise UsageError(f"'{plain}' is not swept: it has its own option, or changes no result")
    if "." not in plain:
        if plain not in RunOptions.model_fields:
            raise config.unknown_option(plain)
        options[plain] = value
        return
    tree = json.loads(json.dumps(options.get("set", {})))
    place = tree
    *path, last = name.split(".")
    for part in path:
        place = place.setdefault(part, {})
    place[last] = value
    options["set"] = tree


def relevant(given: Mapping[str, Any], extract: str, aggregate: str, profile: str) -> dict[str, Any]:
    """Of the plugin options given for the whole matrix those that this pair has a plugin for."""
    chosen = {"extract": extract, "aggregate": aggregate, "profile": profile}
    known = {e.name for e in registry.entries()}
    for name in given:
        if name not in known and name not in chosen:
            raise unknown("plugin", name, known)
    kept: dict[str, Any] = {name: values for name, values in given.items() if name in chosen.values()}
    for role in chosen.keys() & given.keys():
        kept[role] = {name: values for name, values in given[role].items() if name == chosen[role] or name not in known}
    return {name: values for name, values in kept.items() if values != {}}


def refuse_bad(cells: Sequence[Cell]) -> None:
    """What every cell would be refused for is refused at once: an unknown data set, a bad plugin option."""
    from hetfl.core import roles, sources

    for dataset in dict.fromkeys(cell.options.dataset for cell in cells):
        sources.find(dataset)
    for cell in {(cell.extract, cell.aggregate, cell.point): cell for cell in cells}.values():
        with suppress(NotApplicable):
            roles.load(cell.options)


def run(cells: Sequence[Cell], out: Path, jobs: int) -> Iterator[Outcome]:
    """Runs what is not yet in `out` or failed, `jobs` processes at a time; yields every cell's outcome as it is known."""
    waiting: dict[str, list[Cell]] = {}  # a swept option that a pair does not have leaves it one run for several cells
    for cell in cells:
        known = stored(out, cell)
        if known is None or known.status == "failed":
            waiting.setdefault(cell.name, []).append(cell)
        else:
            yield known
    if not waiting:
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures: dict[Future[None], list[Cell]] = {pool.submit(one, same[0], out, jobs): same for same in waiting.values()}
        try:
            for future in as_completed(futures):
                future.result()
                for cell in futures[future]:
                    outcome = stored(out, cell)
                    assert outcome is not None
                    yield replace(outcome, cached=False)
        finally:
            pool.shutdown(cancel_futures=True)


def one(cell: Cell, out: Path, jobs: int) -> None:
    """One cell, in a process of its own; its folder holds a summary, or why there is none."""
    from hetfl.core import experiment
    from hetfl.core.pool import cores
    from hetfl.core.rounds import Unwatched

    folder = Folder(out / "cells" / cell.name).open(overwrite=True)
    workers = max(1, cores() // jobs)
    try:
        experiment.run(cell.options.model_copy(update={"workers": workers, "checkpoint_every": 0}), folder, Unwatched())
    except NotApplicable as error:
        folder.json("refused.json", {"status": "not applicable", "why": str(error).removeprefix("not applicable: ")})
    except Exception as error:
        told = str(error) if isinstance(error, RunError | UsageError) else f"{type(error).__name__}: {error}"
        folder.write("traceback.txt", traceback.format_exc())
        folder.json("refused.json", {"status": "failed", "why": told})


def stored(out: Path, cell: Cell) -> Outcome | None:
    """What `out` holds of a cell."""
    folder = Folder(out / "cells" / cell.name)
    for name in ("summary.json", "refused.json"):
        if (folder.path / name).exists():
            found = folder.read(name)
            return Outcome(cell, found.get("status", "ok"), row(cell, found), cached=True)
    return None


def row(cell: Cell, found: Mapping[str, Any]) -> Row:
    """A cell's line of matrix.csv; costs are means over the levels' clients."""
    base: Row = {"extract": cell.extract, "aggregate": cell.aggregate, **dict(cell.point), "seed": cell.seed}
    if "why" in found:
        return base | {"status": found["status"], "why": found["why"], "config": cell.key}
    accuracies = {name: values["last three"] for name, values in found["accuracy"].items()}
    deciles = {f"{name} p10": values["p10"] for name, values in found["accuracy"].items() if "p10" in values}
    levels = found["levels"]
    costs = {n: statistics.fmean(level[n] for level in levels) for n in ("parameters", "MACs", "memory") if levels}
    totals = {name: found[name] for name in ("bytes down", "bytes up", "client seconds", "seconds")}
    return base | {"status": "ok", **accuracies, **deciles, **costs, **totals, "config": cell.key}


# what a matrix comes to


@dataclass(frozen=True)
class Standing:
    """A pair over the seeds at each point of the sweep: (mean, half width of the 95 % interval, seeds), and its mean rank."""

    extract: str
    aggregate: str
    values: dict[tuple[tuple[str, Any], ...], tuple[float, float, int]]
    rank: float
    why: str = ""


def leaderboard(outcomes: Sequence[Outcome], metric: str) -> list[Standing]:
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
    rows = [Standing(*pair, found, ranks[pair], why.get(pair, "")) for pair, found in values.items()]
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


def write(outcomes: Sequence[Outcome], metric: str, out: Path) -> None:
    """matrix.csv and matrix.parquet (a row a cell and seed) and leaderboard.csv, each whole or not at all."""
    if not outcomes:
        return
    import io

    import pyarrow
    from pyarrow import parquet

    folder = Folder(out)
    rows = [o.row for o in sorted(outcomes, key=lambda o: (o.cell.extract, o.cell.aggregate, str(o.cell.point), o.cell.seed))]
    folder.table("matrix.csv", rows)
    columns = list(dict.fromkeys(name for r in rows for name in r))
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist([{name: r.get(name) for name in columns} for r in rows]), buffer)
    folder.write("matrix.parquet", buffer.getvalue())
    folder.table("leaderboard.csv", [line for s in leaderboard(outcomes, metric) for line in lines(s, metric)])


def lines(standing: Standing, metric: str) -> list[Row]:
    base = {"extract": standing.extract, "aggregate": standing.aggregate, "mean rank": standing.rank, "metric": metric}
    found = [
        {**base, **dict(point), "mean": mean, "half width of the 95 % interval": half, "seeds": n}
        for point, (mean, half, n) in standing.values.items()
    ]
    return found or [{**base, "why": standing.why}]


def label(point: Sequence[tuple[str, Any]]) -> str:
    return ", ".join(f"{name} {value}" for name, value in point) or "all"
