"""What a report shows of a run, or of a matrix of runs: curves, levels, clients and what identifies it all; plain values."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hetfl.config import resolve
from hetfl.errors import UsageError
from hetfl.rounds.rows import (
    BYTES_DOWN,
    BYTES_UP,
    CLOCK,
    JOULES_SO_FAR,
    LEVEL,
    MACS,
    OWN_ACCURACY,
    PARAMETERS,
    ROUND,
    SECONDS,
    is_detail,
    is_of_global,
)  # fmt: skip
from hetfl.runs.cell import NOT_APPLICABLE, count_training_macs
from hetfl.runs.folder import RunFolder

AXES = ("round", "MB", "training GMACs", "seconds")  # what a curve is drawn over: each cumulative but the first
SIMULATED_AXES = {"simulated seconds": CLOCK, "joules": JOULES_SO_FAR}  # further ones, where all runs had --fleet
TARGETS = (0.5, 0.7, 0.8, 0.9, 0.95)
BUDGETS = (0.25, 0.5, 1.0)  # of the most that any pair spent


@dataclass(frozen=True)
class Curve:
    """One pair at one point of a sweep over its seeds, at the evaluated rounds.

    `x` has a list for each of AXES, and of SIMULATED_AXES where its runs had --fleet; `y` for each metric a list of [mean, standard
    deviation] in percent, None where it was not measured. `levels` are rows of level, accuracy in percent and costs, `own` the
    clients' accuracies after the last round.
    """

    pair: str
    point: str
    seeds: int
    control: bool
    x: dict[str, list[float]]
    y: dict[str, list[list[float] | None]]
    levels: list[dict[str, Any]]
    own: list[float]

    @property
    def name(self) -> str:
        return f"{self.pair}, {self.point}" if self.point else self.pair


@dataclass(frozen=True)
class Report:
    """A run or a matrix: `facts` identify it, `counts` are examples by client and class, `notes` what to beware of."""

    title: str
    facts: dict[str, str]
    curves: list[Curve]
    counts: list[list[int]]
    classes: list[str]
    notes: list[str]

    @property
    def axes(self) -> list[str]:
        """What all curves can be drawn over."""
        return [*AXES, *(axis for axis in SIMULATED_AXES if all(axis in c.x for c in self.curves))]

    def data(self) -> dict[str, Any]:
        """What the page's script draws, as JSON-able values."""
        return {"axes": self.axes, "curves": [{**asdict(c), "name": c.name} for c in self.curves], "counts": self.counts,
                "classes": self.classes}  # fmt: skip

    def cost_to_target(self, axis: str) -> list[tuple[str, list[float | None]]]:
        """For each curve the first value on `axis` at which its mean global accuracy reaches each of TARGETS, None where never."""
        return [(c.name, [first_reach(c, axis, 100 * target) for target in TARGETS]) for c in self.curves]

    def quality_under_budget(self, axis: str) -> tuple[list[float], list[tuple[str, list[float | None]]]]:
        """Budgets on `axis`, and for each curve its best mean global accuracy within each."""
        most = max((c.x[axis][-1] for c in self.curves if c.x[axis]), default=0.0)
        budgets = [share * most for share in BUDGETS]
        return budgets, [(c.name, [best_within(c, axis, budget) for budget in budgets]) for c in self.curves]

    def robustness(self) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
        """The points of the sweep, and for each pair its last mean global accuracy at each."""
        points = list(dict.fromkeys(c.point for c in self.curves))
        last = {(c.pair, c.point): last_mean(c) for c in self.curves}
        return points, [(pair, [last.get((pair, p)) for p in points]) for pair in dict.fromkeys(c.pair for c in self.curves)]


def first_reach(curve: Curve, axis: str, target: float) -> float | None:
    """Where on `axis` the mean global accuracy first reaches `target` percent."""
    return next((x for x, y in zip(curve.x[axis], curve.y["global@test"], strict=True) if y and y[0] >= target), None)


def best_within(curve: Curve, axis: str, budget: float) -> float | None:
    """The best mean global accuracy, in percent, at no more than `budget` on `axis`."""
    within = [y[0] for x, y in zip(curve.x[axis], curve.y["global@test"], strict=True) if y and x <= budget * (1 + 1e-9)]
    return max(within, default=None)


def last_mean(curve: Curve) -> float | None:
    """The mean global accuracy of the last evaluated round, in percent."""
    return next((y[0] for y in reversed(curve.y["global@test"]) if y), None)


def read_report(path: Path) -> Report:
    """The report of a run folder or of a matrix. Raises UsageError for anything else."""
    folder = RunFolder(path)
    if folder.holds("matrix.csv"):
        return read_matrix(folder)
    facts, summary = folder.read("run.json"), folder.read("summary.json")
    pair = f"{summary['extract']} x {summary['aggregate']}"
    curve = join_runs(pair, "", [folder])
    return Report(f"{pair} on {summary['dataset']}", identify(folder, facts, summary), [curve], facts["counts"], facts["classes"],
                  list(summary["notes"]))  # fmt: skip


def read_matrix(folder: RunFolder) -> Report:
    """The report of a matrix: a curve for each pair and point, over the seeds. Raises UsageError where no run has ended."""
    rows = folder.rows("matrix.csv")
    groups: dict[tuple[str, str], list[RunFolder]] = {}
    for row in rows:
        if row["status"] == "ok":
            names = list(row)
            swept = names[names.index("aggregate") + 1 : names.index("seed")]
            point = ", ".join(f"{name} {row[name]}" for name in swept if row[name])
            cell = RunFolder(next((folder.path / "cells").glob(f"*-{row['config']}")))
            groups.setdefault((f"{row['extract']} x {row['aggregate']}", point), []).append(cell)
    if not groups:
        raise UsageError(f"the matrix '{folder.path}' holds no run that has ended")
    curves = [join_runs(pair, point, cells) for (pair, point), cells in groups.items()]
    first = next(iter(groups.values()))[0]
    facts, summary = first.read("run.json"), first.read("summary.json")
    notes = [f"{r['extract']} x {r['aggregate']}: {r['status']}: {r['why']}" for r in rows if r["status"] != "ok"]
    identity = {**identify(first, facts, summary), "runs": str(sum(map(len, groups.values()))),
                "seeds": ", ".join(sorted({row["seed"] for row in rows}, key=int))}  # fmt: skip
    identity.pop("weights sha256", None)
    return Report(f"{len({p for p, _ in groups})} pairs on {summary['dataset']}", identity, curves, facts["counts"],
                  facts["classes"], list(dict.fromkeys(notes)))  # fmt: skip


def identify(folder: RunFolder, facts: Mapping[str, Any], summary: Mapping[str, Any]) -> dict[str, str]:
    """What identifies a run and answers a reproducibility checklist: code, data, splits, seeds, hardware, time."""
    options = folder.settings()
    examples = facts["examples"]
    given = [f"{name} {value}" for name, value in facts["versions"].items()]
    preset = facts.get("preset", {})
    return {
        "code": ", ".join(given),
        **({"preset": f"{preset['name']}, sha256 {preset['sha256']}, changed: {', '.join(preset['changed']) or 'nothing'}"}
           if preset else {}),
        "data set": f"{summary['dataset']}, {len(facts['classes'])} classes, examples of shape "
                    f"{' x '.join(map(str, facts['input shape']))}",
        "model": f"{options.get('model', 'the data set its own')}, elastic share {facts['elastic share']:.1%}",
        "splits": f"{sum(examples['clients'])} examples of {summary['clients']} clients, {sum(examples['own test'])} of "
                  f"their own for testing, {examples['tune']} + {examples['holdout']} of the server, {examples['test']} to test",
        "partition": f"{options['partition']}"
                     + (f", alpha {options['alpha']}" if options["partition"] in ("dirichlet", "quantity") else "")
                     + f"; fingerprint {facts['partition fingerprint']}",
        "seeds": f"{facts['seed']}; of the partition {facts['partition seed']}",
        "initial weights sha256": facts["initial weights sha256"],
        "weights sha256": summary["weights sha256"],
        "hardware": f"device {options.get('device', 'cpu')}, {summary['seconds']:.0f} s for {summary['rounds']} rounds",
    }  # fmt: skip


def join_runs(pair: str, point: str, folders: Sequence[RunFolder]) -> Curve:
    """One curve from the runs of a pair at a point, one a seed; rounds that not all of them have are left out."""
    runs = [folder.rows("metrics.csv") for folder in folders]
    people = [folder.rows("clients.csv") for folder in folders]
    measured = [i for i, row in enumerate(runs[0]) if row.get("global@test") and all(len(run) > i for run in runs)]
    axes = [cumulate(run, those, folder) for run, those, folder in zip(runs, people, folders, strict=True)]
    x = {
        axis: [statistics.fmean(one[axis][i] for one in axes) for i in measured]
        for axis in axes[0]
        if all(axis in one for one in axes)
    }
    names = [n for n in runs[0][0] if "@" in n and not is_detail(n) and not n.startswith("sent")]
    y = {name: [spread(100 * float(run[i][name]) for run in runs if run[i].get(name)) for i in measured] for name in names}
    if NOT_APPLICABLE in folders[0].read("summary.json"):
        y |= {name: [None for _ in measured] for name in names if is_of_global(name)}
    own = [100 * float(r[OWN_ACCURACY]) for those in people for r in those if r[ROUND] == those[-1][ROUND] and r.get(OWN_ACCURACY)]
    trained = any(float(row.get(BYTES_UP) or 0) > 0 for run in runs for row in run)
    return Curve(pair, point, len(folders), not trained, x, y, measure_levels(y, people), own)


def cumulate(rows: Sequence[Mapping[str, str]], people: Sequence[Mapping[str, str]], folder: RunFolder) -> dict[str, list[float]]:
    """A run's value on each of AXES after every round."""
    options, macs = resolve(folder.settings()), dict[str, float]()
    for row in people:
        macs[row[ROUND]] = macs.get(row[ROUND], 0.0) + count_training_macs(row, options)
    found: dict[str, list[float]] = {axis: [] for axis in AXES}
    sent = spent = seconds = 0.0
    for row in rows:
        sent += (float(row[BYTES_DOWN]) + float(row[BYTES_UP])) / 1e6
        spent += macs.get(row[ROUND], 0.0) / 1e9
        seconds += float(row[SECONDS])
        for axis, value in zip(AXES, (float(row[ROUND]), sent, spent, seconds), strict=True):
            found[axis].append(value)
    for axis, column in SIMULATED_AXES.items():
        if all(row.get(column) for row in rows):
            found[axis] = [float(row[column]) for row in rows]
    return found


def spread(values: Iterable[float]) -> list[float] | None:
    """[mean, standard deviation] of the seeds, rounded to what can be read; None without values."""
    known = list(values)
    if not known:
        return None
    return [round(statistics.fmean(known), 2), round(statistics.stdev(known), 2) if len(known) > 1 else 0.0]


def measure_levels(
    y: Mapping[str, list[list[float] | None]], people: Sequence[Sequence[Mapping[str, str]]]
) -> list[dict[str, Any]]:
    """For each level its accuracy after the last evaluated round, and what its clients spend on a round, from the widest."""
    found = []
    rows = [row for those in people for row in those if row.get(LEVEL)]
    for level in sorted({row[LEVEL] for row in rows}, key=float, reverse=True):
        mine = [row for row in rows if row[LEVEL] == level]
        accuracy = next(
            (v for name in (f"level-{level}@test", f"personal-{level}@test") for v in reversed(y.get(name, [])) if v), None
        )
        if accuracy:
            found.append({
                "level": level, "accuracy": accuracy[0], "std": accuracy[1],
                "parameters": mean_of(mine, PARAMETERS), "MACs": mean_of(mine, MACS),
                "MB": (mean_of(mine, BYTES_DOWN) + mean_of(mine, BYTES_UP)) / 1e6, "seconds": mean_of(mine, SECONDS),
            })  # fmt: skip
    return found


def mean_of(rows: Sequence[Mapping[str, str]], column: str) -> float:
    """The mean of a column over the rows that have it; 0 without any."""
    values = [float(row[column]) for row in rows if row.get(column)]
    return statistics.fmean(values) if values else 0.0
