"""Accuracy of pairs on one data set over seeds, as a markdown table: python benchmarks/accuracy.py [--dataset digits …]

All options after the script's own are those of `hfl run`. The seed is the partition seed too. Figures are means of the last three
evaluated rounds: mean over seeds (each seed), in percent.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PAIRS = "fedconv:kld,heterofl:kld,fedconv:overlap,heterofl:overlap,fedrolex:overlap,full:fedavg"

NAMES = ("global@test", "level-0.25@test", "sent-0.25@test", "mean level@test", "worst level@test", "control@test")


def measure(pair: str, alpha: str, seed: int, rest: list[str]) -> dict[str, float]:
    """Accuracies of one run, by name."""
    extract, aggregate = pair.split(":")
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        words = ["--extract", extract, "--aggregate", aggregate, "--alpha", alpha, "--out", str(out), *rest]
        seeds = ["--seed", str(seed), "--partition-seed", str(seed)]
        subprocess.run([sys.executable, "-m", "hetfl.cli.main", "run", *words, *seeds], check=True, stdout=subprocess.DEVNULL)
        found = json.loads((out / "summary.json").read_text())["accuracy"]
    return {name: 100 * found[name]["last three"] for name in NAMES if name in found}


def cell(values: list[float]) -> str:
    each = ", ".join(f"{v:.1f}" for v in values)
    return f"{sum(values) / len(values):.1f} ({each})" if values else "-"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", default=PAIRS)
    parser.add_argument("--alphas", default="0.3,0.1")
    parser.add_argument("--seeds", type=int, default=3)
    own, rest = parser.parse_known_args()
    print("| alpha | pair |", " | ".join(NAMES), "|")
    print("|---|---|" + "---|" * len(NAMES))
    for alpha in own.alphas.split(","):
        for pair in own.pairs.split(","):
            runs = [measure(pair, alpha, seed, rest) for seed in range(own.seeds)]
            cells = [cell([r[name] for r in runs if name in r]) for name in NAMES]
            print(f"| {alpha} | {pair.replace(':', ' x ')} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
