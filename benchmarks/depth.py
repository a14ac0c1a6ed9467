"""The tables of docs/strategies/depth.md, strategies that cut depth on a learning task: `python benchmarks/depth.py --out m`.

Digits, a small residual net, twelve clients of four sizes, no data on the server. What is in --out already is not run again. The
learning rate is one for all: that of the best accuracy on clients' held-out examples, over three methods with a seed of their own
(`--choose`). The test split chooses nothing. --page puts the tables into a page of docs/ and every run into docs/results/depth.csv.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cells import Named, add_arguments, fill_section, list_values, run_named, say_failed, show_spread

from hetfl.runs.cell import Row
from hetfl.runs.folder import table_text
from hetfl.runs.sweep import plan_trials

LEVELS = ("1", "0.885", "0.722", "0.5")  # squared about a whole, three quarters, a half, a quarter of the parameters

BASE: dict[str, Any] = {
    "dataset": "digits", "model": "preresnet18", "model_args": {"widths": [12, 12, 12], "blocks": [4, 4, 4]},
    "norm_policy": "layer", "clients": 12, "levels": ",".join(f"{level}:3" for level in LEVELS), "server_data": 0.0,
    "epochs": 1, "batch_size": 32, "rounds": 15, "eval_every": 3, "lr": 0.1,
}  # fmt: skip

METHODS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "`full` x `fedavg`: all hold the whole model": ("full", "fedavg", {}),
    "`depthfl` x `overlap`": ("depthfl", "overlap", {"set": {"depthfl": {"convs": 1}}}),
    "`inclusivefl` x `inclusivefl`": ("inclusivefl", "inclusivefl", {}),
    "`fedra` x `overlap`": ("fedra", "overlap", {}),
    "`nefl` x `nefl`": ("nefl", "nefl", {}),
    "`scalefl` x `overlap`": ("scalefl", "overlap", {"set": {"scalefl": {"convs": 1}}}),
    "`heterofl` x `overlap`: width": ("heterofl", "overlap", {}),
    "`exclusive` x `fedavg`: the three largest alone": ("exclusive", "fedavg", {}),
}

TRIED = ("full", "depthfl", "heterofl")  # by --choose


def plan_runs(base: dict[str, Any], alphas: Iterable[float], seeds: Iterable[int]) -> list[Named]:
    """The run of every method at each alpha with each seed, which is the partition's too."""
    found: list[Named] = []
    for seed, alpha, (name, (extract, aggregate, more)) in itertools.product(seeds, alphas, METHODS.items()):
        values = {**base, "alpha": alpha, "partition_seed": seed, **more}
        found.append(({"name": name, "alpha": alpha}, plan_trials(values, [(extract, aggregate)], {}, [seed])[0]))
    return found


def choose(out: Path, jobs: int) -> None:
    """Prints what each learning rate comes to on clients' held-out examples with a seed that the tables lack."""
    for lr in (0.05, 0.1, 0.2):
        runs = [run for run in plan_runs({**BASE, "lr": lr, "rounds": 8}, (10000.0,), (100,)) if run[1].extract in TRIED]
        rows = run_named(runs, out, jobs)
        own = {row["extract"]: row["submodel@own"] for row in rows}
        shown = ", ".join(f"{name} {own[name]:.1%}" for name in TRIED)
        print(f"lr {lr}: {statistics.fmean(own.values()):.1%} ({shown})", flush=True)


def add_levels(row: Row) -> Row:
    """The row with what devices of every size get, their size's own model where there is one, and of all sizes mean and worst."""
    found = {f"device {level}": row.get(f"personal-{level}@test", row.get(f"level-{level}@test")) for level in LEVELS}
    if None in found.values():
        return row
    return {**row, **found, "mean of devices": statistics.fmean(found.values()), "worst of devices": min(found.values())}


def table(rows: Sequence[Row], alpha: float) -> list[str]:
    """The lines of the table at `alpha`: accuracies over the seeds, then what clients take, a mean over those that train."""
    accuracies = {"global": "global@test", "mean of sizes": "mean of devices", "worst size": "worst of devices"}
    heads = ["method", "seeds", *accuracies, "each size, largest first", "their parameters", "MACs, k", "kB a client and round"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in METHODS:
        ours = [row for row in rows if (row["name"], row["alpha"], row["status"]) == (name, alpha, "ok")]
        if not ours:
            continue
        sizes = [int(size) for level in LEVELS for size in list_values(ours[:1], f"level-{level} parameters")]
        sent = [sum(list_values(ours[:1], f"level-{level} bytes {way}")) for level in LEVELS for way in ("down", "up")]
        cells = [name, str(len(ours)), *(show_spread(list_values(ours, column)) for column in accuracies.values())]
        each = [100 * statistics.fmean(found) for level in LEVELS if (found := list_values(ours, f"device {level}"))]
        cells += [
            ", ".join(f"{value:.0f}" for value in each) or "-",
            ", ".join(f"{size:,}" for size in dict.fromkeys(sizes)),
            f"{ours[0]['MACs'] / 1e3:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} | {sum(sent) / len(sizes) / 1e3:,.0f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_arguments(parser, "depth", alphas="0.5,10000")
    parser.add_argument("--choose", action="store_true", help="only try learning rates")
    given = parser.parse_args()
    if given.choose:
        choose(given.out, given.jobs)
        return
    alphas = [float(alpha) for alpha in given.alphas.split(",")]
    rows = [add_levels(row) for row in run_named(plan_runs(BASE, alphas, range(given.seeds)), given.out, given.jobs, given.known)]
    tables = "\n".join(line for alpha in alphas for line in (f"Alpha {alpha:g}:", "", *table(rows, alpha), ""))
    print(tables)
    if given.page:
        fill_section(given.page, "depth", f"{tables}\n")
        (Path(__file__).parents[1] / "docs" / "results" / "depth.csv").write_text(table_text(rows))
    say_failed(rows, ("name", "alpha", "seed"))


if __name__ == "__main__":
    main()
