"""Pictures for a paper, as PNG, SVG and PDF: a run's curves and who holds what, a sweep's curves and heat-map, scaling."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from hetfl.rounds.rows import CLOCK, JOULES_SO_FAR, ROUND
from hetfl.runs.cell import TrialResult
from hetfl.runs.folder import RunFolder
from hetfl.runs.leaderboard import point_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")  # Okabe and Ito, and a grey

LINES = ("-", "--", "-.", ":")  # change with every colour, so that a print in black and white can be read

MOST_CURVES = len(COLOURS)

AXES = {"curves": ROUND, "curves-seconds": CLOCK, "curves-joules": JOULES_SO_FAR}  # a run's pictures; the last two with --fleet

STYLE: Any = {
    "font.size": 9, "legend.fontsize": 8, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "hetfl", "pdf.fonttype": 42,
}  # fmt: skip

FORMS = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}  # nothing that changes from day to day


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, drawn without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, folder: RunFolder, name: str) -> None:
    """Writes the figure under `name` in every form."""
    for form, facts in FORMS.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format=form, dpi=150, metadata=facts)
        folder.write(f"{name}.{form}", buffer.getvalue())


def draw_run(folder: RunFolder) -> None:
    """Writes curves and partition into the run folder."""
    import matplotlib

    rows = folder.rows("metrics.csv")
    summary = folder.read("summary.json")
    title = f"{summary['extract']} x {summary['aggregate']} on {Path(summary['dataset']).name}, {summary['clients']} clients"
    with matplotlib.rc_context(STYLE):
        for name, axis in AXES.items():
            if axis in rows[-1]:
                figure = new_figure(5.5, 3.6)
                plot_curves(figure.subplots(), rows, title, axis, summary["metric"])
                save(figure, folder, name)
        figure = new_figure(5.5, 3.6)
        show_partition(figure, folder.read("run.json"))
        save(figure, folder, "partition")


def plot_curves(axes: Axes, rows: list[dict[str, str]], title: str, x: str = ROUND, metric: str = "accuracy") -> None:
    """The score `metric` of the test split over column `x`, all measured after the round: the global model, each level's part of
    it, the control."""
    curves = {name: words for name in rows[0] if (words := describe_curve(name))}
    for i, (name, words) in enumerate(curves.items()):
        points = [(float(r[x]), 100 * float(r[name])) for r in rows if r.get(name)]
        marker = "o" if len(points) == 1 else ""
        axes.plot(*zip(*points, strict=True), LINES[i % len(LINES)], color=COLOURS[i % MOST_CURVES], label=words, marker=marker)
    finish(axes, x.removesuffix(" so far"), f"test {metric}, %", title, whole=x == ROUND)
    if curves:
        axes.legend()


def describe_curve(name: str) -> str:
    """What the legend calls a column of metrics.csv; nothing for one that is not drawn."""
    model, at, split = name.partition("@")
    if not at or split != "test":
        return ""
    kind, _, level = model.partition("-")
    plain = {"global": "global model", "sent": "global model, fine-tuned", "control": "server-only control"}
    parts = {"level": f"level {level}", "personal": f"level {level}, own branch"}
    return parts.get(kind, "") if level else plain.get(model, "")


def finish(axes: Axes, x: str, y: str, title: str, *, whole: bool = True) -> None:
    """Labels, and whole numbers along x where it counts something."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel=x, ylabel=y, title=title)
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def show_partition(figure: Figure, facts: dict[str, Any]) -> None:
    """Training examples of every client (row) and class (column)."""
    from matplotlib.ticker import MaxNLocator

    axes, counts = figure.subplots(), facts["counts"]
    image = axes.imshow(counts, aspect="auto", cmap="cividis", interpolation="nearest")
    finish(axes, "class", "client", "who holds what")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(False)
    if len(counts[0]) <= 20:
        names = [str(name) for name in facts["classes"]]
        look: dict[str, Any] = {"rotation": 45, "ha": "right"} if max(map(len, names)) > 2 else {}
        axes.set_xticks(range(len(names)), names, **look)
    figure.colorbar(image, label="training examples")


def draw_matrix(results: Sequence[TrialResult], out: Path, metric: str) -> None:
    """Writes heatmap and curves of a sweep."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        draw_heatmap(results, out, metric)
        draw_seeds(results, out, metric)


def draw_seeds(results: Sequence[TrialResult], out: Path, metric: str) -> None:
    """Curves of `metric` over rounds, a panel a point: the mean over seeds and a band of one standard deviation either side.

    Where there are more pairs than colours, those that end best are drawn.
    """
    curves: dict[str, dict[str, list[dict[int, float]]]] = {}
    for result in (r for r in results if r.row.get(metric) is not None):
        found = read_curve(out / "cells" / result.trial.name / "metrics.csv", metric)
        pairs = curves.setdefault(point_label(result.trial.point), {})
        pairs.setdefault(f"{result.trial.extract} x {result.trial.aggregate}", []).extend([found] if found else [])
    panels = {point: {pair: seeds for pair, seeds in pairs.items() if seeds} for point, pairs in curves.items()}
    panels = {point: pairs for point, pairs in panels.items() if pairs}
    if not panels:
        return
    figure = new_figure(max(4.5, 3.2 * len(panels) + 1), 3.4)
    best = rank_curves(panels)[:MOST_CURVES]
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (point, pairs) in zip(grid, panels.items(), strict=True):
        for i, pair in enumerate(best):
            if pair in pairs:
                plot_band(axes, pairs[pair], COLOURS[i], LINES[i % len(LINES)], pair)
        finish(axes, "round", f"{metric}, %" if axes is grid[0] else "", "" if point == "all" else point)
    handles = {label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=max(1, min(4, len(handles))))
    save(figure, RunFolder(out), "curves")


def read_curve(path: Path, metric: str) -> dict[int, float]:
    """A metric by round, in percent; empty where there is none."""
    if not path.exists():
        return {}
    with path.open() as file:
        return {int(r["round"]): 100 * float(r[metric]) for r in csv.DictReader(file) if r.get(metric)}


def rank_curves(panels: dict[str, dict[str, list[dict[int, float]]]]) -> list[str]:
    """All pairs, the one that ends highest first, by the mean over panels and seeds."""
    ends: dict[str, list[float]] = {}
    for pairs in panels.values():
        for pair, seeds in pairs.items():
            ends.setdefault(pair, []).append(fmean(seed[max(seed)] for seed in seeds))
    return sorted(ends, key=lambda pair: -fmean(ends[pair]))


def plot_band(axes: Axes, seeds: Sequence[dict[int, float]], colour: str, line: str, label: str) -> None:
    """The mean over seeds at the rounds that all of them have, and one standard deviation either side."""
    rounds = sorted(set.intersection(*(set(seed) for seed in seeds)))
    means = [fmean(seed[r] for seed in seeds) for r in rounds]
    axes.plot(rounds, means, line, color=colour, label=label, marker="o" if len(rounds) == 1 else "")
    if len(seeds) > 1:
        spread = [stdev(seed[r] for seed in seeds) for r in rounds]
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(rounds, low, high, color=colour, alpha=0.15, linewidth=0)


def draw_scaling(rows: Sequence[dict[str, Any]], folder: RunFolder) -> None:
    """Writes scale: server seconds by phase, memory and bytes of a round over the number of clients."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = new_figure(10, 3.4)
        seconds, memory, sent = figure.subplots(1, 3)
        counts = [row["clients"] for row in rows]
        phases = [n for n in rows[0] if n.endswith(" seconds") and n != "server seconds" and any(row[n] > 0 for row in rows)]
        for i, name in enumerate(("server seconds", *phases)):
            label = (
                "server, all phases" if name == "server seconds" else name.removesuffix(" seconds").replace("client", "all clients")
            )
            values, style = [row[name] for row in rows], LINES[i % len(LINES)]
            seconds.plot(counts, values, style, color=COLOURS[i % MOST_CURVES], marker="o", label=label)
        memory.plot(counts, [row["peak memory"] / 1e6 for row in rows], color=COLOURS[0], marker="o")
        for i, (name, label) in enumerate({"bytes down": "to clients", "bytes up": "from clients"}.items()):
            sent.plot(counts, [row[name] / 1e6 for row in rows], LINES[i], color=COLOURS[i], marker="o", label=label)
        for axes, what, title in ((seconds, "seconds a round", "server time"), (memory, "MB", "peak memory of the process"),
                                  (sent, "MB a round", "traffic")):  # fmt: skip
            axes.set(xlabel="clients", ylabel=what, xscale="log", yscale="log", title=title)
            mark_counts(axes, counts)
        memory.set(yscale="linear", ylim=(0, None))
        seconds.legend()
        sent.legend()
        save(figure, folder, "scale")


def mark_counts(axes: Axes, counts: Sequence[int]) -> None:
    """Ticks at the numbers of clients, those too near one before it left out, and no others."""
    from matplotlib.ticker import NullLocator

    shown: list[int] = []
    for count in counts:
        if not shown or count >= shown[-1] * (counts[-1] / counts[0]) ** 0.12:
            shown.append(count)
    axes.set_xticks(shown, [f"{count:,}" for count in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def draw_heatmap(outcomes: Sequence[TrialResult], out: Path, metric: str) -> None:
    """Writes heatmap: means over seeds, extractions by aggregations for each point of the sweep, or pairs by points.

    What was run and has no value, for it failed or the metric is not applicable to it, is marked as such.
    """
    values: dict[tuple[str, str, str], list[float]] = {}
    for o in outcomes:
        found = values.setdefault((o.trial.extract, o.trial.aggregate, point_label(o.trial.point)), [])
        found += [100 * o.row[metric]] if o.row.get(metric) is not None else []
    if not any(values.values()):
        return
    extractions, partners, points = (list(dict.fromkeys(key[i] for key in values)) for i in range(3))
    crossed = len(values) > (len(extractions) + len(partners)) * len(points)
    panels = points if crossed else [metric]
    rows = extractions if crossed else list(dict.fromkeys(f"{e} x {a}" for e, a, _ in values))
    columns = partners if crossed else points
    cells = {(p, e, a) if crossed else (metric, f"{e} x {a}", p): fmean(v) if v else nan for (e, a, p), v in values.items()}
    known = [value for value in cells.values() if not isnan(value)]
    bright = (min(known) + 2 * max(known)) / 3
    figure = new_figure(4 + 0.8 * len(columns) * len(panels), 1.5 + 0.35 * len(rows))
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        grid = [[cells.get((panel, row, column), nan) for column in columns] for row in rows]
        image = axes.imshow(grid, aspect="auto", cmap="cividis", vmin=min(known), vmax=max(known))
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_title(panel)
        axes.grid(False)
        for (_, row, column), value in ((key, v) for key, v in cells.items() if key[0] == panel):
            look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7, "color": "w" if value <= bright else "k"}
            axes.text(columns.index(column), rows.index(row), "n/a" if isnan(value) else f"{value:.0f}", **look)
    figure.colorbar(image, ax=figure.axes, label=f"{metric}, %")
    save(figure, RunFolder(out), "heatmap")
