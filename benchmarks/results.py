"""The strategy tables of docs/results.md by one command: `python benchmarks/results.py --out m [option=value …]`.

Every extraction with its natural aggregation and the controls, at each --alphas (10000 is IID) with each seed. A method whose paper
has more to it than the extraction runs as published, with the wraps and the policy for batch norm of its preset, and again bare, as
an ablation. Options after the script's own are those of a run, such as dataset=mnist rounds=30. What is in --out already is not run
again; every run is a line of its results.csv. --page puts the tables into a page of docs/.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cells import Named, fill_section, run_named

from hetfl.presets import find_preset
from hetfl.runs.cell import Row
from hetfl.runs.folder import table_text
from hetfl.runs.leaderboard import measure_spread
from hetfl.runs.sweep import cross_plugins, plan_trials

PRESETS = {  # the preset that says what belongs to an extraction in its paper
    "heterofl": "heterofl/cifar10-noniid-a-e",
    "fedrolex": "fedrolex/cifar10-noniid-a-e",
    "fiarse": "fiarse/cifar10-four",
    "hermes": "hermes/cifar10",
    "scalefl": "scalefl/cifar10",
}

PARTS = ("wrap", "norm_policy")  # of a preset; its other options are those of the experiment

ACCURACIES = ("global@test", "level-0.25@test", "sent-0.25@test", "mean level@test", "worst level@test")

LEVELS = "1:2,0.75:3,0.5:3,0.25:2"


def published(extract: str) -> dict[str, Any]:
    """What goes with an extraction in its paper."""
    values = find_preset(PRESETS[extract]).values if extract in PRESETS else {}
    return {name: values[name] for name in PARTS if name in values}


def plan_runs(extracts: Sequence[str], base: dict[str, Any], alphas: Sequence[float], seeds: int, bare: bool) -> list[Named]:
    """Every run with the name of its row; with `bare`, what runs as published runs bare, too."""
    found: list[Named] = []
    for extract, aggregate in cross_plugins(extracts, ["natural"]):
        parts = published(extract)
        variants = {f"as published: {describe(parts)}": parts} if parts else {"": {}}
        if parts and bare:
            variants["bare"] = {}
        for variant, more in variants.items():
            name = f"`{extract}` x `{aggregate}`" + (f" ({variant})" if variant else "")
            trials = plan_trials({**base, **more}, [(extract, aggregate)], {"alpha": list(alphas)}, range(seeds))
            found += [({"name": name}, trial) for trial in trials]
    return found


def describe(parts: dict[str, Any]) -> str:
    return ", ".join([*(f"`{wrap}`" for wrap in parts.get("wrap", ())), *(f"`{p}`" for k, p in parts.items() if k != "wrap")])


def text(values: Iterable[Any]) -> str:
    """Mean and half width of the 95 % interval over seeds, in per cent."""
    found = [100 * float(v) for v in values if v not in (None, "")]
    if not found:
        return "-"
    spread = measure_spread(found)
    return f"{spread.mean:.1f} ± {spread.half:.1f}" if spread.seeds > 1 else f"{spread.mean:.1f}"


def own(row: Row) -> Any:
    """The accuracy on the clients' own held-out data of what they would now use."""
    return row.get("personal@own") or row.get("submodel@own")


def mean(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean([float(r[name]) for r in rows if r.get(name) is not None] or [0.0])


def table(rows: Sequence[Row], alpha: float) -> list[str]:
    """The lines of the table at `alpha`, the best global model first."""
    found = [row for row in rows if row["alpha"] == alpha and row["status"] == "ok"]
    ours = {name: [row for row in found if row["name"] == name] for name in dict.fromkeys(row["name"] for row in rows)}
    columns = [
        "pair",
        *(name.removesuffix("@test") for name in ACCURACIES),
        "own",
        "MB sent",
        "parameters",
        "MACs",
        "seconds a run",
    ]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for name, runs in sorted(ours.items(), key=lambda pair: -mean(pair[1], "global@test")):
        cells = [name, *(text(row.get(a) for row in runs) for a in ACCURACIES), text(own(row) for row in runs)]
        cells += [f"{(mean(runs, 'bytes down') + mean(runs, 'bytes up')) / 1e6:.2f}"]
        cells += [*(f"{mean(runs, n):,.0f}" for n in ("parameters", "MACs")), f"{mean(runs, 'seconds'):.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    control = {row["seed"]: row["control@test"] for row in found if row.get("control@test")}
    return [*lines, f"| control (server data alone) | {text(control.values())} |" + " - |" * 5 + " |" * 4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--extract", default="all", help="extractions with commas, or all; the controls run too")
    parser.add_argument("--alphas", default="0.1,10000")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--no-bare", action="store_true", help="run methods as published alone")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--page", type=Path, help="a page whose lines between <!-- NAME --> and <!-- end NAME --> are to be the tables"
    )
    parser.add_argument("--section", default="digits", help="that NAME")
    parser.add_argument("options", nargs="*", metavar="option=value")
    given = parser.parse_args()
    base: dict[str, Any] = {"levels": LEVELS}
    for word in given.options:
        name, _, value = word.partition("=")
        base[name] = json.loads(value) if value[:1] in "[{" else value
    alphas = [float(a) for a in given.alphas.split(",")]
    runs = plan_runs(given.extract.split(","), base, alphas, given.seeds, not given.no_bare)
    rows = run_named(runs, given.out, given.jobs)
    (given.out / "results.csv").write_text(table_text(rows))
    tables = "\n".join(line for alpha in alphas for line in ("", f"Alpha {alpha:g}:", "", *table(rows, alpha), ""))
    print(tables)
    if given.page:
        fill_section(given.page, given.section, tables)
    for row in (r for r in rows if r["status"] != "ok"):
        print(f"{row['name']}, alpha {row['alpha']}, seed {row['seed']}: {row['why']}")
    print(f"{sum(os.times()[:4]):.0f} seconds of CPU time")


if __name__ == "__main__":
    main()
