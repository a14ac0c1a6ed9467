"""Attack x aggregation x coverage on digits: python benchmarks/attacks.py [--seeds 3] [--fleets …] [--attacks …] [--rules …]

The attackers are the first clients, which are full-width ones, so that under a mixed fleet they cover the widest channels almost
alone. Each run's global accuracy goes to docs/results/attacks.json, where a run that is there already is not run again; the
table of docs/robustness.md is made from it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cells import fill_section
from torch import Tensor

import hetfl
from hetfl import Field, Plugin, Reply, Task, hookimpl
from hetfl.data.dataset import Examples
from hetfl.models.state import copy_state

ROOT = Path(__file__).parents[1]
PAGE, ROWS = ROOT / "docs" / "robustness.md", ROOT / "docs" / "results" / "attacks.json"

FLEETS = {"all full": "1:10", "half full": "1:5,0.5:5", "2 full": "1:2,0.5:4,0.25:4"}
RULES: dict[str, dict[str, Any]] = {
    "overlap": {"aggregate": "overlap"},
    "overlap, clip 1": {"aggregate": "overlap", "wrap": ["clip"]},
    "median": {"aggregate": "median"},
    "median, least 5": {"aggregate": "median", "set": {"median": {"least": 5}}},
    "trimmed 0.2": {"aggregate": "trimmed-mean", "set": {"trimmed-mean": {"trim": 0.2}}},
    "trimmed 0.4, least 5": {"aggregate": "trimmed-mean", "set": {"trimmed-mean": {"trim": 0.4, "least": 5}}},
    "krum": {"aggregate": "krum"},
    "geomedian": {"aggregate": "geomedian"},
    "kld": {"aggregate": "kld"},
}
ATTACKS = ("none", "sign-flip", "scaling", "noise", "label-flip", "alie")


class Attack(Plugin):
    """The first `attackers` clients send what `kind` says in place of what they trained, or train on false labels."""

    kind: str = Field(
        "none", description="sign-flip: -change; scaling: -10 change; noise: 5 times the change's size; alie: within it"
    )
    attackers: int = Field(0, ge=0, description="how many")

    @hookimpl(wrapper=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        mine, before = task.client < self.attackers, copy_state(task.model)
        if mine and self.kind == "label-flip":
            data = task.data.train
            task.data = replace(task.data, train=Examples(data.x, 9 - data.y, data.index))
        reply = yield
        if mine and self.kind not in ("none", "label-flip"):
            reply.state = {n: self._spoil(before[n], t, task) for n, t in reply.state.items()}
        return reply

    def _spoil(self, before: Tensor, after: Tensor, task: Task) -> Tensor:
        change = after - before
        if not after.is_floating_point():
            return after
        if self.kind == "sign-flip":
            return before - change
        if self.kind == "scaling":
            return before - 10 * change
        if self.kind == "noise":
            noise = torch.randn(change.shape, generator=task.stream("attack"))
            return after + 5 * change.square().mean().sqrt() * noise
        return after - 1.5 * change.std(unbiased=False)  # alie: all attackers alike, within the spread of honest entries


def run(rule: str, fleet: str, attack: str, attackers: int, seed: int, rounds: int) -> dict[str, Any]:
    """One run's row."""
    options = dict(RULES[rule])
    wrap = [Attack(kind=attack, attackers=attackers), *options.pop("wrap", [])]
    began = time.process_time()
    done = hetfl.run(
        extract="heterofl", model="mlp", levels=FLEETS[fleet], rounds=rounds, seed=seed, partition_seed=seed, control=False,
        progress=False, wrap=wrap, **options,
    )  # fmt: skip
    accuracy = done.summary["accuracy"]["global@test"]["last three"]
    left_out = int(done.metrics["left out"].sum())
    return {"rule": rule, "fleet": fleet, "attack": attack, "attackers": attackers, "seed": seed, "rounds": rounds,
            "accuracy": accuracy, "left out": left_out, "cpu seconds": time.process_time() - began}  # fmt: skip


def make_table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, a table a fleet: rules down, attacks across."""
    parts = []
    for fleet in FLEETS:
        ours = [r for r in rows if r["fleet"] == fleet]
        cases = sorted({(r["attackers"], ATTACKS.index(r["attack"])) for r in ours})
        if not ours:
            continue
        heads = [f"{ATTACKS[a]}{f' x{k}' if k else ''}" for k, a in cases]
        seeds = sorted({r["seed"] for r in ours})
        parts += [f"**{fleet}** (`--levels {FLEETS[fleet]}`), {len(seeds)} seed{'s' * (len(seeds) > 1)}:", ""]
        parts += ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
        for rule in RULES:
            cells = [[100 * r["accuracy"] for r in ours if (r["rule"], r["attackers"], r["attack"]) == (rule, k, ATTACKS[a])]
                     for k, a in cases]  # fmt: skip
            parts.append(f"| {rule} | " + " | ".join(map(show, cells)) + " |")
        parts.append("")
    return "\n".join(parts)


def show(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--attackers", default="1,2", help="how many of 10 clients, with commas")
    parser.add_argument("--fleets", default=",".join(FLEETS))
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--rules", default="|".join(RULES), help="separated by |")
    asked = parser.parse_args()
    rows = json.loads(ROWS.read_text()) if ROWS.exists() else []
    counts = [int(n) for n in asked.attackers.split(",")]
    cases = [(a, k) for a in asked.attacks.split(",") for k in (counts if a != "none" else [0])]
    for seed in range(asked.seeds):
        for fleet in asked.fleets.split(","):
            for attack, attackers in cases:
                for rule in asked.rules.split("|"):
                    key = {"rule": rule, "fleet": fleet, "attack": attack, "attackers": attackers, "seed": seed}
                    if any(key.items() <= row.items() and row["rounds"] == asked.rounds for row in rows):
                        continue
                    rows.append(run(rule, fleet, attack, attackers, seed, asked.rounds))
                    print(json.dumps(rows[-1]), flush=True)
                    ROWS.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    fill_section(PAGE, "table", f"\n{make_table(rows)}\n")


if __name__ == "__main__":
    main()
