"""Pictures of a run: the accuracy curves and who holds what."""

from __future__ import annotations

import csv
import io
from typing import Any

from hetfl.core.record import Folder


def draw(folder: Folder) -> None:
    """Writes curves.png and partition.png into the run folder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    with (folder.path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(8, 5), layout="constrained")
    curves(figure.subplots(), rows)
    folder.write("curves.png", png(figure))
    figure = Figure(figsize=(8, 5), layout="constrained")
    partition(figure, folder.read("run.json"))
    folder.write("partition.png", png(figure))


def curves(axes: Any, rows: list[dict[str, str]]) -> None:
    """Accuracy over rounds: global, each level as sent, the control."""
    names = [n for n in rows[0] if "@test" in n and not n.endswith("loss") and not n.startswith("level-")]
    for name in names:
        points = [(int(r["round"]), 100 * float(r[name])) for r in rows if r.get(name)]
        axes.plot(*zip(*points, strict=True), label=name, linestyle="--" if name.startswith("control") else "-")
    axes.set(xlabel="round", ylabel="accuracy, %")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def partition(figure: Any, facts: dict[str, Any]) -> None:
    """Training examples of every client (row) and class (column)."""
    axes = figure.subplots()
    counts = facts["counts"]
    image = axes.imshow(counts, aspect="auto", cmap="viridis")
    axes.set(xlabel="class", ylabel="client")
    if len(counts[0]) <= 20:
        axes.set_xticks(range(len(counts[0])), facts["classes"], rotation=45)
    figure.colorbar(image, label="training examples")


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
