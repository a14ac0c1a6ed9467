"""Pictures: a run's accuracy curves and who holds what, a sweep's heat-map, the curves of scaling."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from math import isnan, nan
from pathlib import Path
from statistics import fmean
from typing import Any

from hetfl.runs.cell import TrialResult
from hetfl.runs.folder import RunFolder
from hetfl.runs.leaderboard import point_label


def draw_run(folder: RunFolder) -> None:
    """Writes curves.png and partition.png into the run folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    with (folder.path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(8, 5), layout="constrained")
    plot_curves(figure.subplots(), rows)
    folder.write("curves.png", to_png(figure))
    figure = Figure(figsize=(8, 5), layout="constrained")
    show_partition(figure, folder.read("run.json"))
    folder.write("partition.png", to_png(figure))


def plot_curves(axes: Any, rows: list[dict[str, str]]) -> None:
    """Accuracy over rounds: global, each level as sent, the control."""
    names = [n for n in rows[0] if "@test" in n and not n.endswith("loss") and not n.startswith("level-")]
    for name in names:
        points = [(int(r["round"]), 100 * float(r[name])) for r in rows if r.get(name)]
        axes.plot(*zip(*points, strict=True), label=name, linestyle="--" if name.startswith("control") else "-")
    axes.set(xlabel="round", ylabel="accuracy, %")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def show_partition(figure: Any, facts: dict[str, Any]) -> None:
    """Training examples of every client (row) and class (column)."""
    axes = figure.subplots()
    counts = facts["counts"]
    image = axes.imshow(counts, aspect="auto", cmap="viridis")
    axes.set(xlabel="class", ylabel="client")
    if len(counts[0]) <= 20:
        axes.set_xticks(range(len(counts[0])), facts["classes"], rotation=45)
    figure.colorbar(image, label="training examples")


def draw_scaling(rows: Sequence[dict[str, Any]], folder: RunFolder) -> None:
    """Writes scale.png: server seconds by phase, memory and bytes of a round over the number of clients."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    seconds, memory, sent = figure.subplots(1, 3)
    counts = [row["clients"] for row in rows]
    for name in ("server seconds", *(key for key in rows[0] if key.endswith(" seconds") and key not in ("server seconds",))):
        if any(row[name] > 0 for row in rows):
            seconds.plot(counts, [row[name] for row in rows], marker="o", label=name)
    memory.plot(counts, [row["peak memory"] / 1e6 for row in rows], marker="o")
    for name in ("bytes down", "bytes up"):
        sent.plot(counts, [row[name] / 1e6 for row in rows], marker="o", label=name)
    for axes, what in ((seconds, "seconds a round"), (memory, "peak memory of the process, MB"), (sent, "MB a round")):
        axes.set(xlabel="clients", ylabel=what, xscale="log", yscale="log")
        axes.grid(alpha=0.3)
    seconds.legend(fontsize="small")
    sent.legend(fontsize="small")
    folder.write("scale.png", to_png(figure))


def draw_heatmap(outcomes: Sequence[TrialResult], out: Path, metric: str) -> None:
    """Writes heatmap.png: means over seeds, extractions by aggregations for each point of the sweep, or pairs by points.

    What was run and has no value, for it failed or the metric is not applicable to it, is marked as such.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

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
    figure = Figure(figsize=(2 + 0.8 * len(columns) * len(panels) + 2, 1.5 + 0.35 * len(rows)), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        grid = [[cells.get((panel, row, column), nan) for column in columns] for row in rows]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=min(known), vmax=max(known))
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_title(panel)
        for (_, row, column), value in ((key, v) for key, v in cells.items() if key[0] == panel):
            look = {"ha": "center", "va": "center", "fontsize": 7, "color": "w" if value <= bright else "k"}
            axes.text(columns.index(column), rows.index(row), "n/a" if isnan(value) else f"{value:.0f}", **look)
    figure.colorbar(image, ax=figure.axes, label=f"{metric}, %")
    RunFolder(out).write("heatmap.png", to_png(figure))


def to_png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
