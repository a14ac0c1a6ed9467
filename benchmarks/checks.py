"""Runs `hfl check` of every built-in plugin and writes docs/results/checks.csv, from which docs/strategies.py has the tiers.

python benchmarks/checks.py [role.name ...]
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import torch

from hetfl import registry
from hetfl.testing.report import check_plugin
from hetfl.testing.subject import Subject

PATH = Path(__file__).resolve().parents[1] / "docs" / "results" / "checks.csv"


def main(names: list[str]) -> None:
    """Checks the plugins named, or all, and renews their lines."""
    torch.set_num_threads(1)
    known = {} if not PATH.exists() else {(row["role"], row["name"]): row for row in csv.DictReader(PATH.open())}
    for entry in registry.builtins():
        if names and entry.key not in names:
            continue
        report = check_plugin(Subject(entry.role, entry.name))
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
