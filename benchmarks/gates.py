"""Do DAC's gates choose better than chance: `python benchmarks/gates.py [--dataset digits] [--model fedconv-cnn] [--seeds 3]`.

Runs `dac` with its gates as learned, and with gates drawn at random after every pass: the same start, passes of the same length,
budgets, tuning and rounds. Prints for levels 0.5 and 0.25 the test accuracy of the cluster's model after the last round,
mean and range over seeds, and how many passes of the search ended with low gates.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import hetfl
from hetfl.plugins.methods import dac

LEVELS = (0.5, 0.25)
COUNTS: Counter[str] = Counter()


class Counted(dac.DAC):
    """DAC, with its passes counted and those that end with low gates."""

    def _train_gates(self, server: hetfl.Server, net: dac.Gated, places: dac.Places, purpose: str, turn: int) -> dac.Gated:
        after = super()._train_gates(server, net, places, purpose, turn)
        COUNTS["passes"] += 1
        COUNTS["passes with low gates"] += bool(dac.count_low(after.gates, self.threshold))
        return after


class Drawn(Counted):
    """DAC without learned gates: a pass trains the weights alone, then every gate is drawn uniformly from [0, 1]."""

    def _train_gates(self, server: hetfl.Server, net: dac.Gated, places: dac.Places, purpose: str, turn: int) -> dac.Gated:
        plain = replace(net.scaled(server.widths, places, net.gates), gates=fill(net.gates, 1.0))
        frozen = self.model_copy(update={"entropy": 0.0, "bound": 0.0, "gate_lr": 0.0})
        trained = dac.DAC._train_gates(frozen, server, plain, places, purpose, turn)
        generator = server.stream(f"{purpose} drawn", turn)
        gates = {name: torch.rand(len(g), generator=generator).clamp(min=1e-3) for name, g in net.gates.items()}
        COUNTS["passes"] += 1
        COUNTS["passes with low gates"] += bool(dac.count_low(gates, self.threshold))
        return replace(trained, gates=gates).scaled(server.widths, places, {name: 1 / g for name, g in gates.items()})


def fill(gates: Mapping[str, Tensor], value: float) -> dict[str, Tensor]:
    """Gates of the same numbers, all of `value`."""
    return {name: torch.full_like(gate, value) for name, gate in gates.items()}


def measure(plugin: type[dac.DAC], seed: int, options: argparse.Namespace) -> dict[str, float]:
    """The accuracy of each level after the last round, in per cent."""
    given: dict[str, Any] = json.loads(options.set)
    run = hetfl.run(
        extract=plugin(**given), aggregate="cluster", dataset=options.dataset, model=options.model, limit=options.limit,
        model_args=json.loads(options.model_args), partition="iid", clients=10, levels="0.5:5,0.25:5", server_data=0.1,
        rounds=options.rounds, epochs=1, control=False, seed=seed, progress=False,
    )  # fmt: skip
    last = run.metrics.iloc[-1]
    return {f"level {w:g}": 100 * float(last[f"personal-{w:g}@test"]) for w in LEVELS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--model", default="fedconv-cnn")
    parser.add_argument("--model-args", default="{}", help="JSON")
    parser.add_argument("--set", default="{}", help="options of dac, JSON")
    parser.add_argument("--limit", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for name, plugin in (("learned", Counted), ("random", Drawn)):
        COUNTS.clear()
        rows = [measure(plugin, seed, options) for seed in range(options.seeds)]
        cells = [
            f"{key} {mean(r[key] for r in rows):.1f} ({min(r[key] for r in rows):.1f} to {max(r[key] for r in rows):.1f})"
            for key in rows[0]
        ]
        print(f"{name}: {'; '.join(cells)}; {dict(COUNTS)}", flush=True)


if __name__ == "__main__":
    main()
