"""`hfl compare`: the table that one pastes."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hetfl.cli import render
from hetfl.cli.console import plain_text, say
from hetfl.cli.options import Debug
from hetfl.cli.render import format_bytes
from hetfl.errors import UsageError, nearest

if TYPE_CHECKING:
    from hetfl.runs.comparison import Method

METRICS = "global@test,mean level@test,worst level@test"

COSTS = ("parameters", "MACs", "memory", "bytes", "seconds")  # of a client of a level in a round

WAYS = ("rounds", "bytes", "MACs", "seconds")

SIMULATED_WAYS = ("simulated seconds", "joules")  # of runs with --fleet

NOT_SIGNIFICANT = "≈"

LATEX = {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
         "±": r"$\pm$", NOT_SIGNIFICANT: r"$^{\approx}$", "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}"}  # fmt: skip

Format = Literal["table", "markdown", "latex", "csv", "json"]


@dataclass(frozen=True)
class Cell:
    """What a cell shows: `place` is 1 for the best of its block, 2 for the second; `value` is its number for CSV and JSON."""

    text: str
    value: Any = None
    place: int = 0


@dataclass(frozen=True)
class Sheet:
    """A table ready to be written, and what is said below it."""

    columns: list[str]
    rows: list[list[Cell]]
    notes: list[str]
    words: int  # leading columns that hold words


def compare(
    paths: Annotated[list[Path], typer.Argument(help="run folders, matrices, or folders of run folders")],
    metric: Annotated[str, typer.Option(help="accuracies with commas; 'NAME p10' is the worst decile")] = METRICS,
    costs: Annotated[str, typer.Option(help=f"what a client of each level spends in a round: {', '.join(COSTS)}, or none")] = (
        "parameters,MACs,bytes"
    ),
    target: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="also rounds, bytes, MACs, seconds (with --fleet simulated ones and joules) until the first metric has it",
        ),
    ] = None,
    interval: Annotated[bool, typer.Option(help="95 % interval in place of the standard deviation")] = False,
    format: Annotated[Format, typer.Option(help="how it is printed")] = "table",
    debug: Debug = False,
) -> None:
    """Put runs side by side: mean and spread over seeds, the best marked, costs of every level."""
    metrics, spent = [m.strip() for m in metric.split(",")], [c.strip() for c in costs.split(",") if c.strip() != "none"]
    for name in spent:
        if name not in COSTS:
            raise UsageError(f"--costs takes {', '.join(COSTS)} or none, not '{name}'{nearest(name, COSTS)}")
    from hetfl.runs.comparison import find_runs, group_runs

    runs = find_runs(paths)
    methods = group_runs(runs)
    known = {name for run in runs for name in run.summary.get("accuracy", {})}
    for name in metrics:
        if known and name.removesuffix(" p10") not in known:
            raise UsageError(f"--metric '{name}' is not among what was measured{nearest(name, known)} ({', '.join(sorted(known))})")
    made = make_sheet(methods, metrics, spent, target, interval)
    refused = dict.fromkeys(f"{run.pair}: {run.summary['status']}: {run.why}" for run in runs if run.why)
    made.notes.extend(refused)
    WRITERS[format](made)


def make_sheet(
    methods: Sequence[Method], metrics: Sequence[str], costs: Sequence[str], target: float | None, interval: bool
) -> Sheet:
    """Everything that is asked of the methods, a row each."""
    options = [name for name, _ in methods[0].point] if methods else []
    found: list[list[Cell]] = [[Cell(m.label, m.label), *(Cell(str(v), v) for _, v in m.point), count_seeds(m)] for m in methods]
    columns, notes = ["method", *options, "seeds"], list[str]()
    for name in metrics:
        columns.append(name.removesuffix("@test") if " level" in name else name)
        for row, cell in zip(found, metric_cells(methods, name, interval), strict=True):
            row.append(cell)
    for what in costs:
        levels = list(dict.fromkeys(level for m in methods for level in m.levels))
        columns.append(f"{what} at {' / '.join(sorted(levels, key=float, reverse=True))}")
        for row, method in zip(found, methods, strict=True):
            row.append(cost_cell(method, sorted(levels, key=float, reverse=True), what))
    if target is not None:
        ways = [method.ways(metrics[0], target) for method in methods]
        timed = any(SIMULATED_WAYS[0] in way for each in ways for way in each if way)
        shown = [*WAYS, *(SIMULATED_WAYS if timed else ())]
        columns += [f"{what} to {100 * target:g}%" for what in shown]
        for row, each in zip(found, ways, strict=True):
            row += way_cells(each, shown)
        notes.append(
            f"to {100 * target:g}%: until {metrics[0]} first reached it, the mean over the seeds that did; MACs of training, a "
            "backward pass counted as two forward ones; seconds on the clock of the machine that ran it"
        )
    return Sheet(columns, found, [*explain(methods, found, interval), *notes], 1 + len(options))


def count_seeds(method: Method) -> Cell:
    return Cell(str(len(method.runs)), len(method.runs))


def metric_cells(methods: Sequence[Method], metric: str, interval: bool) -> list[Cell]:
    """A metric of every method, with its place among those of the same setting."""
    from hetfl.runs.comparison import not_significant
    from hetfl.runs.leaderboard import measure_spread

    values = [method.values(metric) for method in methods]
    means = [statistics.fmean(v.values()) if v else -math.inf for v in values]
    cells = []
    for i, method in enumerate(methods):
        if not values[i]:
            cells.append(Cell("n/a", {"mean": None}))
            continue
        block = sorted((j for j, m in enumerate(methods) if m.point == method.point and values[j]), key=lambda j: -means[j])
        places = sorted({round(means[j], 12) for j in block}, reverse=True)
        place = places.index(round(means[i], 12)) + 1
        mean, std, half, n = measure_spread([*values[i].values()])
        spread = half if interval else std
        alike = NOT_SIGNIFICANT if place > 1 and not_significant(values[block[0]], values[i]) else ""
        text = f"{100 * mean:.1f}" + (f" ± {100 * spread:.1f}" if n > 1 else "") + alike
        told = {"mean": mean, "interval" if interval else "std": None if n < 2 else spread, "not significant": bool(alike)}
        cells.append(Cell(text, told, place if place <= 2 and len(block) > 1 else 0))
    return cells


def cost_cell(method: Method, levels: Sequence[str], what: str) -> Cell:
    """What a client of each level spends of `what`, the widest level first."""
    found = {level: method.cost(level, what) for level in levels}
    show: Callable[[float], str] = format_bytes if what in ("bytes", "memory") else format_count
    texts = ["-" if value is None else show(value) for value in found.values()]
    return Cell(" / ".join(texts), found)


def format_count(number: float) -> str:
    """A number with three digits and its unit: 1.56M."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:,.3g}T"


def way_cells(ways: Sequence[dict[str, float] | None], shown: Sequence[str]) -> list[Cell]:
    """What is `shown` of the ways to a target: means over the seeds that reached it, and how many did."""
    reached = [way for way in ways if way is not None]
    if not reached:
        return [Cell("never", None) for _ in shown]
    of = "" if len(reached) == len(ways) else f" ({len(reached)} of {len(ways)} seeds)"
    cells = []
    for name in shown:
        known = [way[name] for way in reached if name in way]
        mean = statistics.fmean(known) if known else None
        show: Callable[[float], str] = {"bytes": format_bytes, "MACs": format_count}.get(name, "{:.3g}".format)
        cells.append(Cell("-" if mean is None else show(mean) + (of if name == "rounds" else ""), mean))
    return cells


def explain(methods: Sequence[Method], rows: Sequence[Sequence[Cell]], interval: bool) -> list[str]:
    """What the numbers are, in sentences."""
    seeds = [len(method.runs) for method in methods]
    what = "95 % interval (Student's t)" if interval else "standard deviation"
    notes = ["%, the mean of the last three evaluations" + (f", mean over seeds ± {what}" if max(seeds, default=0) > 1 else "")]
    if max(seeds, default=0) > 1:
        notes.append("best bold, second underlined, within a setting" if any(m.point for m in methods) else
                     "best bold, second underlined")  # fmt: skip
    if any(NOT_SIGNIFICANT in cell.text for row in rows for cell in row):
        notes.append(f"{NOT_SIGNIFICANT}: not significantly different from the best (t test paired by seed, 5 %)")
    if min(seeds, default=2) < 2:
        notes.append("with one seed nothing is said of the spread, nor of whether a difference is significant")
    elif min(seeds, default=3) == 2:
        notes.append("two seeds say little: an interval is 9 standard deviations to either side")
    if any(cell.text == "n/a" for row in rows for cell in row):
        notes.append("n/a: the method has no such model (a control whose clients share nothing has no global one)")
    return notes


def print_table(sheet: Sheet) -> None:
    """For the terminal."""
    looks = {0: "", 1: "bold", 2: "underline"}
    rows = [[plain_text(cell.text, looks[cell.place]) for cell in row] for row in sheet.rows]
    render.print_table(sheet.columns, rows, sheet.words, sheet.words)
    for note in sheet.notes:
        say(note)


def print_markdown(sheet: Sheet) -> None:
    looks = {0: "{}", 1: "**{}**", 2: "<u>{}</u>"}
    align = ["---"] * sheet.words + ["---:"] * (len(sheet.columns) - sheet.words)
    lines = [sheet.columns, align, *([looks[c.place].format(c.text.replace("|", r"\|")) for c in row] for row in sheet.rows)]
    for line in lines:
        say("| " + " | ".join(line) + " |")
    say("")
    for note in sheet.notes:
        say(f"- {note}")


def print_latex(sheet: Sheet) -> None:
    """For the package booktabs."""
    looks = {0: "{}", 1: r"\textbf{{{}}}", 2: r"\underline{{{}}}"}
    say(r"% \usepackage{booktabs}")
    say(r"\begin{tabular}{" + "l" * sheet.words + "r" * (len(sheet.columns) - sheet.words) + "}")
    say(r"\toprule")
    say(" & ".join(map(escape_latex, sheet.columns)) + r" \\")
    say(r"\midrule")
    for row in sheet.rows:
        say(" & ".join(looks[cell.place].format(escape_latex(cell.text)) for cell in row) + r" \\")
    say(r"\bottomrule")
    say(r"\end{tabular}")
    for note in sheet.notes:
        say(f"% {note}")


def escape_latex(text: str) -> str:
    return "".join(LATEX.get(letter, letter) for letter in text)


def flat_rows(sheet: Sheet) -> list[dict[str, Any]]:
    """The rows by column, with what a cell has of several numbers in columns of their own."""
    found = []
    for row in sheet.rows:
        flat: dict[str, Any] = {}
        for column, cell in zip(sheet.columns, row, strict=True):
            name = column.partition(" at ")[0]
            flat |= {f"{name} {n}": v for n, v in cell.value.items()} if isinstance(cell.value, Mapping) else {name: cell.value}
        found.append(flat)
    return found


def print_csv(sheet: Sheet) -> None:
    rows, text = flat_rows(sheet), io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    csv.DictWriter(text, columns, lineterminator="\n").writerows([dict(zip(columns, columns, strict=True)), *rows])
    sys.stdout.write(text.getvalue())


def print_json(sheet: Sheet) -> None:
    sys.stdout.write(json.dumps({"rows": flat_rows(sheet), "notes": sheet.notes}, indent=1) + "\n")


WRITERS: dict[str, Callable[[Sheet], None]] = {
    "table": print_table, "markdown": print_markdown, "latex": print_latex, "csv": print_csv, "json": print_json,
}  # fmt: skip
