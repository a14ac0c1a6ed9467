"""One run of a sweep: its options, and what came of it."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hetfl import registry
from hetfl.config import PASSES, RunOptions
from hetfl.digest import digest_json
from hetfl.errors import UsageError, nearest
from hetfl.rounds.rows import EXAMPLES, MACS

NOT_APPLICABLE = "not applicable"  # in a summary: why accuracies of the global model are none of the run's

LEVEL_COSTS = ("parameters", "MACs", "memory", "bytes down", "bytes up", "seconds")  # of a client of a level in a round

WITHOUT_EFFECT = {"out", "overwrite", "workers", "ray_address", "client_gpus"}  # options that change no result


@dataclass(frozen=True)
class Trial:
    """One run: what the sweep varies in it beside pair and seed (`point`), and the whole of its options."""

    point: tuple[tuple[str, Any], ...]
    options: RunOptions

    @property
    def extract(self) -> str:
        return self.options.extract

    @property
    def aggregate(self) -> str:
        return self.options.aggregate or registry.partner_of(self.extract)

    @property
    def seed(self) -> int:
        return self.options.seed

    @property
    def key(self) -> str:
        """A hash of all that its result depends on."""
        values = self.options.model_dump(mode="json", exclude=WITHOUT_EFFECT)
        return digest_json(values)[:16]

    @property
    def name(self) -> str:
        """Of its folder; a plugin given as package.module:Class is named by its class."""
        return f"{registry.find('extract', self.extract).name}-{registry.find('aggregate', self.aggregate).name}-{self.key}"


Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class TrialResult:
    """What became of a trial: "ok", "not applicable" or "failed", and its row of matrix.csv, with `why` where it is not ok.

    `cached`: it was there from an earlier sweep.
    """

    trial: Trial
    status: str
    row: Row = field(default_factory=dict)
    cached: bool = False


METRIC = re.compile(  # the accuracies that a run may measure
    r"((global|sent|control|pretrained|mean level|worst level|(level|sent|personal)-[0-9.e-]+)@test"
    r"|(client|submodel|personal)@own|global@own masked)( p10)?"
)

USUAL_METRICS = (
    "global@test", "sent@test", "level-0.25@test", "sent-0.25@test", "personal-0.25@test", "control@test", "pretrained@test",
    "client@own", "submodel@own", "personal@own", "global@own masked",
)  # fmt: skip


def check_metric(name: str) -> None:
    """Raises UsageError, before anything is run, where no run could measure an accuracy of that name."""
    if not METRIC.fullmatch(name):
        raise UsageError(f"no run measures the metric '{name}'{nearest(name, USUAL_METRICS)} ({', '.join(USUAL_METRICS)})")


def result_row(trial: Trial, summary: Mapping[str, Any]) -> Row:
    """A trial's line of matrix.csv from its summary.json or refused.json; costs are those of the levels, and their means."""
    base: Row = {"extract": trial.extract, "aggregate": trial.aggregate, **dict(trial.point), "seed": trial.seed}
    if "why" in summary:
        return base | {"status": summary["status"], "why": summary["why"], "config": trial.key}
    accuracies = {name: to_number(values.get("last three", values["last"])) for name, values in summary["accuracy"].items()}
    if (before := summary.get("pre-training")) is not None:
        accuracies["pretrained@test"] = before["accuracy"]
    deciles = {f"{name} p10": values["p10"] for name, values in summary["accuracy"].items() if "p10" in values}
    levels = summary["levels"]
    costs = {n: statistics.fmean(level[n] for level in levels) for n in ("parameters", "MACs", "memory") if levels}
    costs |= {f"level-{level['level']} {n}": level[n] for level in levels for n in LEVEL_COSTS if n in level}
    totals = {name: to_number(summary[name]) for name in ("bytes down", "bytes up", "client seconds", "seconds")}
    why = {"why": summary[NOT_APPLICABLE]} if NOT_APPLICABLE in summary else {}
    return base | {"status": "ok", **why, **accuracies, **deciles, **costs, **totals, "config": trial.key}


def to_number(value: Any) -> Any:
    """The number that a summary holds, or None. Raises ValueError for anything else."""
    if value is not None and not isinstance(value, int | float):
        raise ValueError(f"{value!r} is no number")
    return value


def count_training_macs(row: Mapping[str, str], options: RunOptions) -> float:
    """The multiply-accumulates of a client's training in one round, from its line of clients.csv; 0 where it did not train."""
    if not row.get(MACS) or not row.get(EXAMPLES):
        return 0.0
    return PASSES * float(row[MACS]) * options.count_work(int(row[EXAMPLES]))[0]
