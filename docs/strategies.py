"""Writes strategies.md from registry.toml: `python docs/strategies.py`."""

from __future__ import annotations

import csv
from pathlib import Path

from hetfl.registry import ROLES, Entry, builtins

PAGE = Path(__file__).with_name("strategies.md")

BASELINES = ("serveralone", "standalone", "exclusive", "full", "lgfedavg", "feddropout", "fjord", "median", "trimmed-mean",
             "krum", "geomedian")  # fmt: skip

ADAPTERS = ("loraranks", "flexlora", "flora", "hetlora", "fedsa", "ffa")

DEPTH = ("depthfl", "fedra", "inclusivefl", "nefl")

PAGES = {
    "cluster": "dac",
    **dict.fromkeys(BASELINES, "baselines"),
    **dict.fromkeys(ADAPTERS, "adapters"),
    **dict.fromkeys(("fedproto", "fedtgp"), "prototypes"),
    **dict.fromkeys(DEPTH, "depth"),
}  # names without a page of their own

COLUMNS = ("name", "what it does", "paper", "natural aggregation", "granularity", "needs public data", "client memory", "tier")

CHECKS = PAGE.parent / "results" / "checks.csv"  # written by benchmarks/checks.py


def tiers() -> dict[tuple[str, str], str]:
    """The tier of every plugin that was checked, by role and name."""
    if not CHECKS.exists():
        return {}
    with CHECKS.open() as file:
        return {(row["role"], row["name"]): f"{row['tier']} ({row['ran']} checks)" for row in csv.DictReader(file)}


def line(entry: Entry) -> str:
    page = f"strategies/{PAGES.get(entry.name, entry.name)}.md"
    name = f"[`{entry.name}`]({page})" if (PAGE.parent / page).exists() else f"`{entry.name}`"
    answers = ["yes" if flag else "no" for flag in (entry.public, entry.memory)]
    tier = tiers().get((entry.role, entry.name), "-")
    return "| " + " | ".join([name, entry.summary, entry.paper, entry.aggregate or "-", entry.granularity, *answers, tier]) + " |"


def text() -> str:
    """The page."""
    parts = ["# Strategies", "", "Generated from registry.toml by `python docs/strategies.py`."]
    parts[2] += " Any extraction pairs with any aggregation."
    parts[2] += "\nThe tier is what [`hfl check`](checking.md) found, with how many checks ran ([table](results/checks.csv))."
    for role in ROLES:
        entries = [e for e in builtins() if e.role == role]
        if entries:
            head = "| " + " | ".join(COLUMNS) + " |"
            parts += ["", f"## {role}", "", head, "|" + "---|" * len(COLUMNS), *map(line, entries)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(text())
