"""Runs `hfl check` of every built-in plugin and writes docs/results/checks.csv, from which docs/strategies.py has the tiers.

python benchmarks/checks.py [role.name ...]
"""

from __future__ import annotations

import csv
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from hetfl import registry
from hetfl.testing.report import check_plugin
from hetfl.testing.subject import Subject

TRACE = Path(tempfile.mkdtemp()) / "trace.csv"
TRACE.write_text("round,client,width\n1,0,1\n1,1,0.5\n2,2,0.25\n")

SETTINGS: dict[str, dict[str, Any]] = {  # of plugins that cannot repeat a run, or run at all, without one
    "wrap.dp": {"set": {"dp": {"seed": 0}}},  # its noise is the server's secret otherwise, another one in every run
    "profile.trace": {"set": {"trace": {"file": str(TRACE)}}},
}

PATH = Path(__file__).resolve().parents[1] / "docs" / "results" / "checks.csv"


def main(names: list[str]) -> None:
    """Checks the plugins named, or all, and renews their lines."""
    torch.set_num_threads(1)
    known = {} if not PATH.exists() else {(row["role"], row["name"]): row for row in csv.DictReader(PATH.open())}
    for entry in registry.builtins():
        if names and entry.key not in names:
            continue
        report = check_plugin(Subject(entry.role, entry.name, SETTINGS.get(entry.key, {})))
        facts = {name: str(value) for name, value in report.facts().items() if name != "checks"}
        odd = [f"{r.name}: {r.text}" for r in report.results if r.status != "passed"]
        known[entry.role, entry.name] = facts | {"why": "; ".join(odd)}
        print(entry.key, facts["tier"], facts["ran"], odd, flush=True)
        write([known[e.role, e.name] for e in registry.builtins() if (e.role, e.name) in known])


def write(rows: list[dict[str, str]]) -> None:
    """Writes the table."""
    with PATH.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
