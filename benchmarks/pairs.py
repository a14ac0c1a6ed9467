"""The tables of docs/pairs.md, which pair leads for all sizes of device: `python benchmarks/pairs.py --out m`.

Every pair takes the same number of steps on the server's data in a round (STEPS at most, for tuning may end early), whoever takes
them: the extraction, the aggregation, or the run's fine-tuning. What is in --out already is not run again. `--look` is what the
candidates were chosen by: digits, with a quarter of the TRAINING examples in the place of the test split. --page puts the tables
into a page of docs/ and every run into docs/results/pairs.csv.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import add_arguments, fill_section, list_values, run_named, say_failed, show_spread

from hetfl import Plugin, Reply, Task, hookimpl
from hetfl.config import DataOptions
from hetfl.data.loading import load
from hetfl.plugins.methods.fjord import FjORD
from hetfl.runs.cell import Row, Trial
from hetfl.runs.folder import table_text
from hetfl.runs.sweep import plan_trials

STEPS = 40  # on server data a round, of 64 examples

BASE: dict[str, Any] = {
    "levels": "1:2,0.75:3,0.5:3,0.25:2", "clients": 10, "epochs": 1, "rounds": 10, "eval_every": 2, "server_batch_size": 64,
}  # fmt: skip

SETS: dict[str, dict[str, Any]] = {
    "digits": {"dataset": "digits"},
    "mnist": {"dataset": "mnist", "limit": 1000},
    "ag_news": {
        "dataset": "ag_news", "limit": 8000, "tokens": 24, "vocab": 2048, "optimizer": "adam", "lr": 0.002,
        "model_args": {"width": 32, "layers": 1, "dropout": 0.0},
    },
    "sp_sw_har": {"dataset": "sp_sw_har", "limit": 1000, "model_args": {"widths": [16, 32, 32]}},
}  # fmt: skip

TUNED = {"server_finetune_steps": STEPS}


class Ordered(Plugin):
    """FjORD's training on the clients, under another extraction."""

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        return (yield from FjORD().fit(task))


def kld(levels: str, steps: int = STEPS, **more: Any) -> dict[str, Any]:
    return {"set": {"kld": {"levels": levels, "steps": steps, **more}}}


def fedconv(steps: int, tuning: int, levels: str = "global", **more: Any) -> dict[str, Any]:
    """FedConv's filters of three size classes take `steps` each."""
    return {"set": {"fedconv": {"steps": steps, "first_steps": steps}, "kld": {"levels": levels, "steps": tuning}}, **more}


def splitmix(first: int, tuning: int, levels: str, **more: Any) -> dict[str, Any]:
    """Each of four bases takes `first` in round 1, for all of which together the weights take fewer in each of the rounds."""
    return {"set": {"splitmix": {"first_steps": first}, "kld": {"levels": levels, "steps": tuning, **more}}}


PAIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "`fedconv` x `kld`": ("fedconv", "kld", fedconv(8, 16)),
    "`fjord` x `kld` (`fleet`, `lr=0.03`)": ("fjord", "kld", kld("fleet", lr=0.03)),
    "`fedrolex` x `kld` (`fleet`)": ("fedrolex", "kld", kld("fleet")),
    "`fjord` x `overlap`, fine-tuned": ("fjord", "overlap", TUNED),
    "`heterofl` x `overlap`, fine-tuned": ("heterofl", "overlap", TUNED),
    "`fedrolex` x `overlap`, fine-tuned": ("fedrolex", "overlap", TUNED),
}

LOOK: dict[str, tuple[str, str, dict[str, Any]]] = {
    **PAIRS,
    "`fedconv` x `kld`, 4 + 28": ("fedconv", "kld", fedconv(4, 28)),
    "`fedconv` x `kld`, clients as `fjord`": ("fedconv", "kld", fedconv(8, 16, wrap=("pairs:Ordered",))),
    "`fjord` x `kld` (`fleet`)": ("fjord", "kld", kld("fleet")),
    "`fjord` x `kld` (`fleet`, `distill=1`)": ("fjord", "kld", kld("fleet", distill=1.0)),
    "`fjord` x `overlap`, no server steps": ("fjord", "overlap", {}),
    "`fjord` x `overlap`, fine-tuned, `server_lr=0.003`": ("fjord", "overlap", {**TUNED, "server_lr": 0.003}),
    "`fjord` x `overlap`, fine-tuned, `server_lr=0.01`": ("fjord", "overlap", {**TUNED, "server_lr": 0.01}),
    "`fjord` x `overlap`, fine-tuned, `server_lr=0.03`": ("fjord", "overlap", {**TUNED, "server_lr": 0.03}),
    "`splitmix` x `overlap`, its first 300 server steps": ("splitmix", "overlap", {}),
    "`splitmix` x `kld` (`fleet`), 10 + 36": ("splitmix", "kld", splitmix(10, 36, "fleet")),
    "`splitmix` x `kld` (`fleet`), 40 + 24": ("splitmix", "kld", splitmix(40, 24, "fleet")),
    "`splitmix` x `kld`, 40 + 24": ("splitmix", "kld", splitmix(40, 24, "global")),
    "`splitmix` x `kld` (`fleet`, `lr=0.03`), 40 + 24": ("splitmix", "kld", splitmix(40, 24, "fleet", lr=0.03)),
}

COLUMNS = ("mean level@test", "worst level@test", "global@test", "control@test")


def plan_runs(
    pairs: Mapping[str, tuple[str, str, dict[str, Any]]], base: Mapping[str, Any], alpha: float, seed: int
) -> list[tuple[str, Trial]]:
    """The run of every pair at `alpha` with the pair's name; the seed is the partition's too."""
    common = {**BASE, **base, "alpha": alpha, "partition_seed": seed}
    return [(name, plan_trials({**common, **more}, [(e, a)], {}, [seed])[0]) for name, (e, a, more) in pairs.items()]


def hold_back(dataset: str, folder: Path) -> dict[str, Any]:
    """The options of a data set that is the training examples of `dataset` alone, a quarter of them as its test split."""
    import numpy as np

    examples = load(DataOptions(dataset=dataset, server_data=0, own_test=0)).clients[0].train
    rows = np.random.default_rng(0).permutation(len(examples.y))
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[len(rows) // 4 :]), ("test", rows[: len(rows) // 4])):
        np.savez(folder / f"{name}.npz", x=examples.x.numpy()[part], y=examples.y.numpy()[part])
    return {"dataset": str(folder), "model": "fedconv-cnn"}


def table(rows: Sequence[Row], dataset: str, alpha: float) -> list[str]:
    """The lines of the table of a data set at `alpha`, the best mean level first.

    Where all pairs have as many seeds, the best of each column is bold.
    """
    found = [row for row in rows if (row["data set"], row["alpha"], row["status"]) == (dataset, alpha, "ok")]
    ours = {name: [row for row in found if row["name"] == name] for name in dict.fromkeys(row["name"] for row in found)}
    means = {name: {c: statistics.fmean(seen) for c in COLUMNS if (seen := list_values(runs, c))} for name, runs in ours.items()}
    fair = len({len(runs) for runs in ours.values()}) == 1 and len(ours) >= len(PAIRS)
    best = {} if not fair else {c: max((m[c] for m in means.values() if c in m), default=0.0) for c in COLUMNS[:3]}
    lines = ["| pair | mean level | worst level | global | its control | seeds |", "|---|---|---|---|---|---|"]
    for name, runs in sorted(ours.items(), key=lambda pair: -means[pair[0]][COLUMNS[0]]):
        cells = [show_spread(list_values(runs, c)) for c in COLUMNS]
        leads = [c in best and means[name][c] == best[c] for c in COLUMNS]
        marked = [f"**{cell}**" if first else cell for cell, first in zip(cells, leads, strict=True)]
        lines.append(f"| {name} | " + " | ".join(marked) + f" | {len(runs)} |")
    return lines


def average(rows: Sequence[Row]) -> list[str]:
    """The lines of the means over all data sets and alphas, by seed, the best mean level first; none where runs are missing."""
    ended = [row for row in rows if row["status"] == "ok"]
    found = {name: {(r["data set"], r["alpha"], r["seed"]): r for r in ended if r["name"] == name} for name in PAIRS}
    cases = {*found[next(iter(PAIRS))]}
    if not cases or any(runs.keys() != cases for runs in found.values()):
        return []
    seeds = sorted({seed for _, _, seed in cases})
    means = {
        name: {c: [statistics.fmean(list_values((r for r in runs.values() if r["seed"] == s), c)) for s in seeds] for c in COLUMNS}
        for name, runs in found.items()
    }
    order = sorted(means, key=lambda name: -statistics.fmean(means[name][COLUMNS[0]]))
    lines = [f"| {name} | " + " | ".join(show_spread(means[name][c]) for c in COLUMNS) + " |" for name in order]
    return ["| pair | mean level | worst level | global | its control |", "|---|---|---|---|---|", *lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sets", default=",".join(SETS))
    add_arguments(parser, "pairs", alphas="0.1,10000")
    parser.add_argument("--look", action="store_true", help="the candidates, on digits' training examples, with two other seeds")
    given = parser.parse_args()
    alphas = [float(a) for a in given.alphas.split(",")]
    sets = {"digits": hold_back("digits", given.out / "digits")} if given.look else {n: SETS[n] for n in given.sets.split(",")}
    pairs, seeds = (LOOK, range(10, 12)) if given.look else (PAIRS, range(given.seeds))
    runs = [
        ({"data set": n, "alpha": a, "name": name}, trial)
        for a in alphas for s in seeds for n, base in sets.items() for name, trial in plan_runs(pairs, base, a, s)
    ]  # fmt: skip
    rows = run_named(runs, given.out, given.jobs, given.known)
    done = [(a, n) for a in alphas for n in sets if any((r["data set"], r["alpha"]) == (n, a) for r in rows)]
    tables = [line for a, n in done for line in (f"{n}, alpha {a:g}:", "", *table(rows, n, a), "")]
    if len(done) > 1 and (means := average(rows)):
        tables += [f"Mean of these {len(done)} tables:", "", *means]
    print("\n".join(tables))
    if given.page:
        fill_section(given.page, "pairs", "\n".join(tables))
        (given.page.parent / "results" / "pairs.csv").write_text(table_text(rows))
    say_failed(rows, ("name", "data set", "alpha", "seed"))


if __name__ == "__main__":
    main()
