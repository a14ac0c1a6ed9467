"""What the scripts share that fill tables with the cells of a matrix: named runs, mean and spread over seeds, and where they go."""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hetfl.runs.cell import Row, Trial
from hetfl.runs.sweep import read_result, run_trials

Named = tuple[Mapping[str, Any], Trial]  # what a table calls a run, such as its name and data set, and the run


def run_named(runs: Sequence[Named], out: Path, jobs: int, known: bool = False) -> list[Row]:
    """The line of every run, with what the table calls it in front. What is in `out` is not run again; `known`: that alone."""
    (out / "cells").mkdir(parents=True, exist_ok=True)
    facts, trials = {trial.key: called for called, trial in runs}, [trial for _, trial in runs]
    there = (read_result(out, trial) for trial in trials)
    results = (found for found in there if found is not None) if known else run_trials(trials, out, jobs)
    return [{**facts[result.trial.key], **result.row} for result in results]


def add_arguments(parser: argparse.ArgumentParser, section: str, alphas: str) -> None:
    """What such a script is told on the command line; `section` is that of the page."""
    parser.add_argument("--alphas", default=alphas)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--known", action="store_true", help="run nothing: the tables of what is in --out")
    parser.add_argument("--out", type=Path, required=True)
    place = f"<!-- {section} --> and <!-- end {section} -->"
    parser.add_argument("--page", type=Path, help=f"the page whose lines between {place} are made")


def say_failed(rows: Iterable[Row], names: Sequence[str]) -> None:
    """The runs without a result, by the columns `names`, and why; and the CPU time that the script took."""
    for row in (r for r in rows if r["status"] != "ok"):
        print(f"{', '.join(f'{name} {row[name]}' for name in names)}: {row['why']}")
    print(f"{sum(os.times()[:4]):.0f} seconds of CPU time")


def list_values(rows: Iterable[Row], name: str) -> list[float]:
    """A column, where it has values."""
    return [float(row[name]) for row in rows if row.get(name) is not None]


def show_spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, in per cent."""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}" if values else "-"


def fill_section(page: Path, name: str, lines: str) -> None:
    """Puts `lines` in the place of what a page has between <!-- NAME --> and <!-- end NAME -->."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{page} has no section between <!-- {name} --> and <!-- end {name} -->")
    page.write_text(before + begin + lines + end + after)
