"""`hfl reproduce`: the field's published tables, ours beside theirs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hetfl.cli import render
from hetfl.cli.console import complain, console, say
from hetfl.cli.options import Debug
from hetfl.cli.study import make_folder, refuse_failed, show_trials
from hetfl.errors import UsageError, plural

if TYPE_CHECKING:
    from hetfl.runs.cell import Trial, TrialResult
    from hetfl.runs.reproduction import Score
    from hetfl.runs.tables import TableRow

UNITS = {"": 60.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def reproduce(
    table: Annotated[str | None, typer.Argument(help="a table by name (default: all)")] = None,
    rows: Annotated[str | None, typer.Option(help="rows whose names hold one of these words, with commas")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="end in this time, such as 30m or 2h, and begin no row that would not: cheap ones first, unknown cost last; "
            "what then runs goes on another time"
        ),
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="seeds of a row (default: as the table says)")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at once, each a process with its share of the cores")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda …")] = "cpu",
    out: Annotated[Path, typer.Option(help="folder; what was stopped goes on there")] = Path("reproduction"),
    list_only: Annotated[bool, typer.Option("--list", help="only list the tables, their rows, and what they cost")] = False,
    debug: Debug = False,
) -> None:
    """Run the rows of published tables, and print paper | others | ours. What is in --out already is not run again."""
    from hetfl.runs import reproduction, sweep, tables
    from hetfl.training.device import prepare_device

    seconds = None if budget is None else parse_duration(budget)
    words = [word.strip() for word in (rows or "").split(",") if word.strip()]
    if rows is not None and not words:
        raise UsageError("--rows takes names of rows, or words in them, with commas")
    chosen = tables.find_rows(table, words)
    for fault in tables.find_faults():
        complain(f"{fault}; the others' tables are there")
    if list_only:
        print_list(chosen)
        return

    def plan(row: TableRow) -> list[Trial]:
        return row.trials(seeds, device=device)

    chosen = leave_out_bad(chosen, plan, strict=table is not None)
    trials = [trial for row in chosen for trial in plan(row)]
    prepare_device(trials[0].options)
    make_folder(out / "cells", out)
    results: list[TrialResult] = []

    def write() -> list[Score]:
        scores = reproduction.score_rows(chosen, out, plan)
        reproduction.write_scorecard(scores, device, out)
        return scores

    def running() -> Iterator[TrialResult]:
        write()
        for result in reproduction.run_rows(chosen, out, jobs, plan, seconds):
            write()
            yield result

    of_points = {plan(row)[0].point: row for row in chosen}
    announce(chosen, out, jobs, plan)
    show_trials(running(), trials, lambda result: list_values(of_points[result.trial.point], result), results, out)
    print_scores(write(), out)
    say_left([row for row in chosen if not all(sweep.has_ended(out, trial) for trial in plan(row))])
    refuse_failed(results)


def leave_out_bad(rows: Sequence[TableRow], plan: Callable[[TableRow], list[Trial]], strict: bool) -> list[TableRow]:
    """The rows of which runs can be made; what is wrong with the others is said.

    Raises UsageError for the first of these where there are no more rows, or, where `strict`, at once.
    """
    from hetfl.runs.reproduction import find_bad

    bad = find_bad(rows, plan)
    for error in bad.values():
        if strict or len(bad) == len(rows):
            raise error
        complain(f"{error}; the other rows are there")
    return [row for row in rows if row not in bad]


def say_left(rows: Sequence[TableRow]) -> None:
    """Which rows have no result yet, if any."""
    if rows:
        names = ", ".join(f"{row.table} {row.name}" for row in rows[:3]) + (", …" if len(rows) > 3 else "")
        say(f"{plural(len(rows), 'row')} left to run or to end: {names}; the same command goes on there")


def announce(rows: Sequence[TableRow], out: Path, jobs: int, plan: Callable[[TableRow], list[Trial]]) -> None:
    """What is to be run, and what that takes."""
    from hetfl.runs.reproduction import estimate_seconds, find_cost
    from hetfl.runs.sweep import has_ended

    todo = {row: new for row in rows if (new := [trial for trial in plan(row) if not has_ended(out, trial)])}
    costs = {row: cost for row in todo if (cost := find_cost(out, row, plan)) is not None}
    minutes = sum(estimate_seconds(out, todo[row], cost, jobs) for row, cost in costs.items()) / 60
    unknown = len(todo) - len(costs)
    said = [f"about {minutes:,.0f} minutes"] if costs else []
    said += [f"{plural(unknown, 'row')} of unknown cost"] if unknown else []
    runs = plural(sum(map(len, todo.values())), "run")
    say(f"{runs} of {plural(len(todo), 'row')} to do" + (f": {', '.join(said)}" if said else ""))


def list_values(row: TableRow, result: TrialResult) -> str:
    """What a run came to of what its row compares."""
    from hetfl.runs.reproduction import value_of

    values = {metric: value_of(result.row, metric) for metric in row.published}
    return ", ".join(f"{metric} {'not measured' if v is None else format(v, '.1f')}" for metric, v in values.items())


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `30m`, `1.5h`; minutes where there is no unit. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise UsageError(f"--budget takes a time such as 90s, 30m or 2h, not '{text}'")
    return float(match[1]) * UNITS[match[2]]


def print_list(rows: Sequence[TableRow]) -> None:
    """What there is to reproduce, table by table."""
    from hetfl.runs import tables

    for table in tables.tables().values():
        mine = [row for row in rows if row.table == table.name]
        if mine:
            say(f"{table.name} ({table.paper}): {table.about}", "bold")
            say(f"from: {table.source}")
            say(f"band: {table.describe_band()}")
            say_unlike("", mine)
            render.print_table(("row", "published", "minutes a seed", "seeds"), [list_cells(row) for row in mine])
            console.print()


def say_unlike(where: str, rows: Sequence[TableRow]) -> None:
    """What holds for all of the rows, then what some add."""
    from hetfl.runs.tables import list_unlike

    for names, text in list_unlike(rows).items():
        say(f"{where}unlike the paper{names and f' ({names})'}: {text}")


def list_cells(row: TableRow) -> tuple[str, ...]:
    """A row's line of the list."""
    printed = ", ".join(f"{metric} {value:g}" for metric, value in row.published.items())
    return row.name, printed, "unknown" if row.minutes is None else f"{row.minutes:g}", str(row.seeds)


def print_scores(scores: Sequence[Score], out: Path) -> None:
    """The scorecard: paper, others, ours."""
    lines = []
    for s in scores:
        spread = "" if s.std is None else f" ± {s.std:.2f}"
        ours = "" if s.mean is None else f"{s.mean:.2f}{spread} ({s.seeds})"
        others = ", ".join(f"{who} {value:g}" for who, value in s.others.items())
        lines.append((s.row.table, s.row.name, s.metric, f"{s.published:g}", others, ours, s.verdict))
    console.print()
    say("percent (MB where it says so), mean ± standard deviation (seeds) of the last three evaluated rounds", "bold")
    render.print_table(("table", "row", "metric", "paper", "others", "ours", "within the band"), lines, keys=3)
    rows = list(dict.fromkeys(s.row for s in scores))
    for table in dict.fromkeys(row.table for row in rows):
        say_unlike(f"{table}, ", [row for row in rows if row.table == table])
    for text in dict.fromkeys(f"{s.row.name}, {s.metric} {s.published:g}: {s.row.disputed}" for s in scores if s.row.disputed):
        say(text)
    say(f"folder: {out} (scorecard.csv, cells/)")
