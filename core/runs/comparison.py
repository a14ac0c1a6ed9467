"""Runs that have ended, side by side: means over seeds, what differs beyond chance, costs a level, and the way to a target."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hetfl.config import DataOptions, RunOptions, resolve
from hetfl.errors import UsageError, nearest
from hetfl.rounds.rows import BYTES_DOWN, BYTES_UP, CLOCK, JOULES, JOULES_SO_FAR, ROUND, SECONDS, SIMULATED
from hetfl.runs.cell import WITHOUT_EFFECT, count_training_macs
from hetfl.runs.folder import RunFolder
from hetfl.runs.leaderboard import quantile

UNCOMPARED = {*WITHOUT_EFFECT, "checkpoint_every", "keep_checkpoints", "preset", "vmap", "eval_batch_size"}
SEEDS = {"seed", "partition_seed"}
SETTING = {*DataOptions.model_fields, "model", "model_args", "levels", "rounds"} - SEEDS  # what rows must share to be compared
FOLLOWING = {"extract", "aggregate", "norm_policy", "mean", "std", "tokens", "vocab"}  # said by the pair, or by the data


@dataclass(frozen=True, eq=False)
class EndedRun:
    """A run in its folder that has ended, or that was refused with the reason `why`."""

    folder: RunFolder
    options: RunOptions
    summary: Mapping[str, Any]

    @property
    def pair(self) -> str:
        return f"{self.options.extract} x {self.options.aggregate or 'natural'}"

    @property
    def seed(self) -> tuple[int, int | None]:
        return self.options.seed, self.options.partition_seed

    @property
    def why(self) -> str:
        return str(self.summary.get("why", ""))

    def value(self, metric: str) -> float | None:
        """The mean of the last three evaluations, or `METRIC p10`; None where the run has no such accuracy."""
        name = metric.removesuffix(" p10")
        found = self.summary.get("accuracy", {}).get(name, {})
        value = found.get("last three", found.get("last")) if name == metric else found.get("p10")
        return None if value is None else float(value)

    def level(self, name: str, what: str) -> float | None:
        """What a client of level `name` spends of `what` in a round."""
        found: Mapping[str, Any] = next((level for level in self.summary.get("levels", ()) if level["level"] == name), {})
        if what == "bytes":
            return float(found[BYTES_DOWN] + found[BYTES_UP]) if BYTES_DOWN in found else None
        return float(found[what]) if what in found else None

    def way(self, metric: str, target: float) -> dict[str, float] | None:
        """Rounds, bytes, training MACs and seconds until `metric` first reached `target`; None where it never did.

        With --fleet simulated seconds and joules, too.
        """
        rows = self.folder.rows("metrics.csv")
        reached = next((int(r[ROUND]) for r in rows if r.get(metric) and float(r[metric]) >= target), None)
        if reached is None:
            return None
        before = [r for r in rows if int(r[ROUND]) <= reached]
        clients = [r for r in self.folder.rows("clients.csv") if int(r[ROUND]) <= reached]
        macs = sum(count_training_macs(r, self.options) for r in clients)
        sent = sum(float(r[BYTES_DOWN]) + float(r[BYTES_UP]) for r in before)
        found = {"rounds": reached, "bytes": sent, "MACs": macs, "seconds": sum(float(r[SECONDS]) for r in before)}
        clock = {SIMULATED: CLOCK, JOULES: JOULES_SO_FAR}
        return found | {what: float(before[-1][column]) for what, column in clock.items() if before[-1].get(column)}


@dataclass(frozen=True, eq=False)
class Method:
    """The runs that differ in nothing but their seeds. `point` is what the compared settings differ in, `label` the rest."""

    label: str
    point: tuple[tuple[str, Any], ...]
    runs: Sequence[EndedRun]

    def values(self, metric: str) -> dict[tuple[int, int | None], float]:
        """The metric by seed, of the runs that have it."""
        return {run.seed: value for run in self.runs if (value := run.value(metric)) is not None}

    @cached_property
    def levels(self) -> list[str]:
        """The levels of its clients, the widest first."""
        return list(dict.fromkeys(level["level"] for run in self.runs for level in run.summary.get("levels", ())))

    def cost(self, level: str, what: str) -> float | None:
        """The mean over seeds of what a client of a level spends."""
        found = [value for run in self.runs if (value := run.level(level, what)) is not None]
        return statistics.fmean(found) if found else None

    def ways(self, metric: str, target: float) -> list[dict[str, float] | None]:
        return [run.way(metric, target) for run in self.runs]


def find_runs(paths: Sequence[Path]) -> list[EndedRun]:
    """The runs in the folders: run folders, matrices, and folders of run folders. Raises UsageError where there is none."""
    found = []
    for path in paths:
        if not path.is_dir():
            raise UsageError(f"'{path}' is no folder{nearest(path.name, [p.name for p in path.parent.glob('*/')])}")
        here = [run for folder in list_folders(path) if (run := read_run(folder)) is not None]
        if not here:
            raise UsageError(f"'{path}' holds no run of hetfl that has ended: name run folders, or the folder of a matrix")
        found += here
    return list({run.folder.path.resolve(): run for run in found}.values())


def list_folders(path: Path) -> Iterator[Path]:
    """The folder itself where it is a run's, else those below it."""
    if (path / "config.toml").exists():
        yield path
    else:
        yield from sorted(p for p in ((path / "cells") if (path / "cells").is_dir() else path).iterdir() if p.is_dir())


def read_run(path: Path) -> EndedRun | None:
    """The run in a folder; None where there is none that has ended."""
    folder = RunFolder(path)
    name = next((n for n in ("summary.json", "refused.json") if folder.holds(n)), None)
    if name is None or not folder.holds("config.toml"):
        return None
    values = folder.settings()
    summary = folder.read(name)
    if not values:
        return None
    return EndedRun(folder, resolve(values), summary)


def group_runs(runs: Sequence[EndedRun]) -> list[Method]:
    """The runs by method: those alike in all but the seed, in the order in which they came."""
    flat = [(run, flatten(run.options)) for run in runs if not run.why]
    groups: dict[tuple[tuple[str, str], ...], list[tuple[EndedRun, dict[str, Any]]]] = {}
    for run, options in flat:
        key = tuple(sorted((name, repr(value)) for name, value in options.items() if name not in SEEDS))
        groups.setdefault(key, []).append((run, options))
    firsts = [members[0][1] for members in groups.values()]
    names = [name for name in dict.fromkeys(n for options in firsts for n in options) if name not in FOLLOWING | SEEDS]
    varied = [name for name in names if differs(name, firsts)]
    methods = []
    for members in groups.values():
        run, options = members[0]
        more = [f"{short(n)} {options[n]}" for n in varied if n not in SETTING and n in options]
        point = tuple((n, options.get(n)) for n in varied if n in SETTING)
        methods.append(Method(", ".join([run.pair, *more]), point, [run for run, _ in members]))
    return sorted(methods, key=lambda m: [str(value) for _, value in m.point])


def flatten(options: RunOptions) -> dict[str, Any]:
    """Options with an effect by name, those of plugins as role.plugin.option."""
    values = options.model_dump(mode="json", exclude=UNCOMPARED)
    for role, plugins in values.pop("set").items():
        for plugin, mine in plugins.items() if isinstance(plugins, dict) else ():
            values |= {f"{role}.{plugin}.{n}": v for n, v in mine.items()} if isinstance(mine, dict) else {f"{role}.{plugin}": mine}
    return values


def differs(name: str, options: Sequence[Mapping[str, Any]]) -> bool:
    """Whether those that have an option have it with several values."""
    return len({repr(one[name]) for one in options if name in one}) > 1


def short(name: str) -> str:
    """`extract.fedconv.steps` as fedconv.steps."""
    return name.split(".", 1)[1] if name.count(".") == 2 else name


def not_significant(one: Mapping[Any, float], other: Mapping[Any, float]) -> bool | None:
    """Whether the values of two methods, paired by seed, differ by no more than chance (two-sided t test, 5 %).

    None where fewer than two seeds are common: nothing can be said.
    """
    differences = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
    if len(differences) < 2:
        return None
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    return abs(mean) <= quantile(len(differences) - 1) * spread / math.sqrt(len(differences))
