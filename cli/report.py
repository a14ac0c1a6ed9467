"""`hfl report`: one HTML file for a run or a matrix, which opens without network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hetfl.cli.console import say
from hetfl.cli.options import Debug
from hetfl.errors import foreign
from hetfl.files import write_file

if TYPE_CHECKING:
    from hetfl.runs.report import Report

PAGE = Path(__file__).with_name("report.html")
LONGEST = 60  # rows of a table; the figures of all others are in the pictures and in the folder's CSV files


def report(
    folder: Annotated[Path, typer.Argument(help="folder of a run, or of a matrix")],
    out: Annotated[Path | None, typer.Option(help="the file (default: report.html in the folder)")] = None,
    debug: Debug = False,
) -> None:
    """Write one HTML file that shows a run or a matrix: curves, levels, clients, costs to a target, and what to repeat it with."""
    from hetfl.runs.report import read_report

    with foreign(f"'{folder}'"):
        found, path = read_report(folder), out or folder / "report.html"
    write_file(path, render_page(found, folder).encode())
    say(f"{path} ({path.stat().st_size / 1e3:.0f} kB)")


def render_page(report: Report, folder: Path) -> str:
    """The page: the template with the tables as HTML and the curves as JSON."""
    data = json.dumps(report.data(), separators=(",", ":")).replace("<", "\\u003c")
    facts = html_table("What identifies this", ("fact", "value"), report.facts.items(), "facts")
    return Template(PAGE.read_text(encoding="utf-8")).substitute(
        title=escape(report.title), folder=escape(str(folder)), command=escape(f"hfl report {folder}"), data=data,
        notes="".join(f'<p class="note">{escape(note)}</p>' for note in report.notes[:20]), level_table=level_table(report),
        protocols=protocol_tables(report), facts=facts,
    )  # fmt: skip


def level_table(report: Report) -> str:
    """Accuracy and cost of every pair's levels."""
    names = ("pair", "level", "accuracy, %", "parameters", "MACs", "MB a round", "seconds a round")
    rows = [
        (c.name, level["level"], f"{level['accuracy']:.1f}" + (f" ± {level['std']:.1f}" if level["std"] else ""),
         f"{level['parameters']:,.0f}", f"{level['MACs']:,.0f}", f"{level['MB']:.3g}", f"{level['seconds']:.3g}")
        for c in report.curves for level in c.levels
    ]  # fmt: skip
    return html_table("After the last evaluated round", names, rows[:LONGEST])


def protocol_tables(report: Report) -> str:
    """Quality under a budget and cost to a target by bytes, compute, simulated time, energy; robustness over the sweep's points."""
    from hetfl.runs.report import TARGETS

    parts = []
    for axis in (a for a in report.axes if a not in ("round", "seconds")):
        budgets, rows = report.quality_under_budget(axis)
        parts.append(number_table(f"Quality under a budget: best global accuracy, %, within so many {axis}",
                                  [f"{b:.3g}" for b in budgets], rows, highest=True))  # fmt: skip
        targets = [f"{t:.0%}" for t in TARGETS]
        parts.append(number_table(f"Cost to a target: {axis} until the global accuracy is reached", targets,
                                  report.cost_to_target(axis), highest=False))  # fmt: skip
    points, pairs = report.robustness()
    if len(points) > 1:
        parts.append(number_table("Robustness: global accuracy, %, over the points of the sweep", points, pairs, highest=True))
    return "".join(parts)


def number_table(caption: str, columns: Sequence[str], rows: Sequence[tuple[str, list[float | None]]], highest: bool) -> str:
    """A table of numbers, the best of each column bold; a dash where there is none."""
    choose = max if highest else min
    best = [choose((v for _, values in rows if (v := values[k]) is not None), default=None) for k in range(len(columns))]
    body = "".join(
        f"<tr><td>{escape(name)}</td>" + "".join(number_cell(v, best[k]) for k, v in enumerate(values)) + "</tr>"
        for name, values in rows[:LONGEST]
    )
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in ("pair", *columns))
    return wrap_table(caption, head, body)


def number_cell(value: float | None, best: float | None) -> str:
    return "<td>-</td>" if value is None else f"<td{' class=best' if value == best else ''}>{value:.4g}</td>"


def html_table(caption: str, columns: Sequence[str], rows: Any, kind: str = "") -> str:
    """A table of texts."""
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return wrap_table(caption, head, body, kind)


def wrap_table(caption: str, head: str, body: str, kind: str = "") -> str:
    """A table that scrolls by itself where the window is narrow."""
    table = f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table class="{kind}">{table}</table></div>'
