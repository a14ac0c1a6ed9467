"""The table of docs/results.md from a matrix: `python benchmarks/results.py m/matrix.csv`."""

from __future__ import annotations

import csv
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hetfl.runs.leaderboard import interval

Row = Mapping[str, str]


def text(values: Iterable[str]) -> str:
    """Mean and half width of the 95 % interval over seeds, in per cent."""
    found = [100 * float(v) for v in values if v]
    if not found:
        return "-"
    mean, half, _ = interval(found)
    return f"{mean:.1f} ± {half:.1f}"


def own(row: Row) -> str:
    """The accuracy on the clients' own held-out data of what they would now use."""
    return row.get("personal@own") or row.get("submodel@own", "")


def mean(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean(float(r[name]) for r in rows if r[name])


def line(rows: Sequence[Row], alphas: Sequence[str]) -> str:
    cells = [f"`{rows[0]['extract']}` x `{rows[0]['aggregate']}`"]
    for alpha in alphas:
        ours = [r for r in rows if r["alpha"] == alpha]
        cells += [text(r["global@test"] for r in ours), text(own(r) for r in ours)]
    sent = mean(rows, "bytes down") + mean(rows, "bytes up")
    costs = [f"{mean(rows, n):,.0f}" for n in ("parameters", "MACs")] if rows[0]["parameters"] else ["-", "-"]
    return "| " + " | ".join([*cells, f"{sent / 1e6:.2f}", *costs, f"{mean(rows, 'seconds'):.0f}"]) + " |"


def main() -> None:
    rows = list(csv.DictReader(Path(sys.argv[1]).read_text().splitlines()))
    alphas = sorted({r["alpha"] for r in rows}, key=float)
    pairs = sorted({(r["extract"], r["aggregate"]) for r in rows})
    tables = [[r for r in rows if (r["extract"], r["aggregate"]) == pair and r["status"] == "ok"] for pair in pairs]
    tables.sort(key=lambda t: -mean([r for r in t if r["alpha"] == alphas[0]], "global@test"))
    head = [name for alpha in alphas for name in (f"global, alpha {alpha}", f"own, alpha {alpha}")]
    columns = ["pair", *head, "MB sent", "parameters", "MACs", "seconds a run"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for table in tables:
        print(line(table, alphas))
    control = [r for r in rows if r.get("control@test")]
    print(
        "| control (server data alone) | "
        + " | ".join(
            text(r["control@test"] for r in control if r["alpha"] == a and r["extract"] == "heterofl") + " | -" for a in alphas
        )
        + " | | | | |"
    )


if __name__ == "__main__":
    main()
