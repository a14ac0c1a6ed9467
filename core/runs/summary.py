"""What a run came to: accuracies, costs, bytes, warnings."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from importlib.metadata import version
from statistics import fmean
from typing import Any

import torch

from hetfl import presets
from hetfl.config import RunOptions, resolve
from hetfl.data.dataset import FederatedDataset
from hetfl.digest import digest_tensors
from hetfl.models.state import State
from hetfl.rounds.rows import (
    BYTES_DOWN,
    BYTES_UP,
    CLIENT_SECONDS,
    CLOCK,
    DROPPED,
    FAULT,
    JOULES,
    JOULES_SO_FAR,
    LEVEL,
    MACS,
    MEMORY,
    PARAMETERS,
    PHASE,
    SECONDS,
    SIMULATED,
    Row,
    is_of_global,
)  # fmt: skip
from hetfl.runs.cell import NOT_APPLICABLE
from hetfl.runs.experiment import Experiment
from hetfl.runs.folder import BASE_HASH
from hetfl.runs.given import object_facts

PACKAGES = ("hetfl", "torch", "flwr", "flwr-datasets", "datasets", "pluggy", "pydantic")


def run_facts(experiment: Experiment) -> dict[str, Any]:
    """What identifies a run: versions, hashes, who holds what, the width groups."""
    federation, widths = experiment.federation, experiment.server.widths
    return {
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        **preset_origin(experiment.given), **object_facts(experiment.given),
        "seed": experiment.options.seed, "partition seed": experiment.options.partition_seed,
        "partition fingerprint": federation.fingerprint, "initial weights sha256": digest_tensors(experiment.initial, shapes=False),
        **({BASE_HASH: base} if (base := experiment.server.builder.base_hash) else {}),
        "classes": list(federation.classes), "input shape": list(federation.shape),
        "examples": {"clients": [len(c.train) for c in federation.clients], "own test": [len(c.test) for c in federation.clients],
                     "tune": len(federation.public.tune) if federation.public else 0,
                     "holdout": len(federation.public.holdout) if federation.public else 0, "test": len(federation.test)},
        "counts": federation.class_counts.tolist(),
        "widths": {g.name: g.size for g in widths.groups}, "frozen": widths.frozen, "elastic share": widths.elastic(),
    }  # fmt: skip


def preset_origin(options: RunOptions) -> dict[str, Any]:
    """The preset that a run began from, the hash of its settings, and which of them the run changed."""
    if options.preset is None:
        return {}
    preset, now = presets.find_preset(options.preset), options.model_dump(mode="json")
    asked = resolve({**preset.values, "preset": preset.name}).model_dump(mode="json")
    changed = [name for name in preset.values if now[name] != asked[name]]
    return {"preset": {"name": preset.name, "sha256": preset.digest, "changed": changed}}


def class_counts(federation: FederatedDataset) -> list[Row]:
    """Who holds what: a row a client, training examples of every class and in all."""
    rows = enumerate(federation.class_counts.tolist())
    return [{"client": i, **dict(zip(federation.classes, row, strict=True)), "all": sum(row)} for i, row in rows]


def summarise(experiment: Experiment, seconds: float) -> dict[str, Any]:
    """What a run came to: last accuracies, sizes per level, bytes, where the time went, and what to beware of."""
    rows, trains_global = experiment.state.rows, experiment.plugins.trains_global
    measured = [row for row in rows if "global@test" in row]
    accuracies = final_accuracies(measured)
    if not trains_global:
        accuracies = {name: values for name, values in accuracies.items() if not is_of_global(name)}
    phases = sorted({key for row in rows for key in row if key.startswith(PHASE)})
    server = {key.removeprefix(PHASE): sum(row.get(key, 0.0) for row in rows) for key in phases}
    return {
        "extract": experiment.options.extract, "aggregate": experiment.options.aggregate,
        "dataset": experiment.federation.dataset, "rounds": len(rows), "clients": len(experiment.federation.clients),
        "accuracy": accuracies, **pretraining_facts(experiment), "levels": level_costs(experiment), "seconds": seconds,
        **({} if trains_global else {NOT_APPLICABLE: WITHOUT_GLOBAL}),
        "seconds by phase": {**experiment.seconds, **server},
        "client seconds": sum(row[CLIENT_SECONDS] for row in rows),
        **time_to_accuracy(rows), BYTES_DOWN: sum(row[BYTES_DOWN] for row in rows), BYTES_UP: sum(row[BYTES_UP] for row in rows),
        "weights sha256": digest_tensors(experiment.server.state, shapes=False),
        "notes": [*dict.fromkeys(experiment.server.notes), *own_notes(experiment),
                  *(compare_to_control(measured, len(experiment.federation.test)) if trains_global else [])],
    }  # fmt: skip


TARGETS = (0.5, 0.7, 0.8, 0.9, 0.95)


def time_to_accuracy(rows: Sequence[Row]) -> dict[str, Any]:
    """Of a run with --fleet: its simulated seconds and joules, and the seconds until the global model first reached TARGETS."""
    if not rows or CLOCK not in rows[-1]:
        return {}
    reached = {f"{t:g}": next((r[CLOCK] for r in rows if r.get("global@test", 0.0) >= t), None) for t in TARGETS}
    return {
        SIMULATED: rows[-1][CLOCK], JOULES: rows[-1][JOULES_SO_FAR], DROPPED: sum(row[DROPPED] for row in rows),
        "simulated seconds to accuracy": {target: moment for target, moment in reached.items() if moment is not None},
    }  # fmt: skip


def final_accuracies(measured: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Every accuracy of the last evaluated round, and its mean over the last three evaluated rounds, where all of them have it."""
    names = [key for key in measured[-1] if "@" in key and not key.endswith((" loss", " p10"))]
    return {name: last_values(name, measured) for name in names}


def last_values(name: str, measured: Sequence[Row]) -> dict[str, float]:
    last = [row[name] for row in measured[-3:] if name in row]
    found = {"last": last[-1], **({"last three": sum(last) / len(last)} if len(last) == len(measured[-3:]) else {})}
    extra = {key: measured[-1][f"{name} {key}"] for key in ("loss", "p10") if f"{name} {key}" in measured[-1]}
    return {**found, **extra}


WITHOUT_GLOBAL = "no global model is trained here, so its accuracies are not applicable: read personal@own, the clients' own models"

COSTS = (PARAMETERS, MACS, MEMORY, BYTES_DOWN, BYTES_UP, SECONDS)


def level_costs(experiment: Experiment) -> list[dict[str, Any]]:
    """What the clients of each level spent in a round, on average: the papers' tables of memory, time and communication."""
    rows = [row for row in experiment.state.client_rows if FAULT not in row and DROPPED not in row]
    levels = sorted({row[LEVEL] for row in rows}, key=float, reverse=True)
    return [{"level": level} | averages([row for row in rows if row[LEVEL] == level]) for level in levels]


def averages(rows: Sequence[Row]) -> dict[str, float]:
    found = {name: [row[name] for row in rows if name in row] for name in COSTS}
    means = {name: sum(values) / len(values) for name, values in found.items() if values}
    return {name: value if name == "seconds" else round(value) for name, value in means.items()}


def own_notes(experiment: Experiment) -> list[str]:
    """What early stopping on the hold-out left out of tuning, and that the global model never moved, where that is so."""
    server, first, notes = experiment.server, experiment.state.initial, list[str]()
    if saved := server.steps_saved:
        epochs = f"({server.epochs_saved:.1f} epochs)"
        notes.append(f"early stopping on the hold-out saved {saved} of {saved + server.steps} server steps {epochs}")
    if not experiment.plugins.trains_global:
        notes.append(WITHOUT_GLOBAL)
    elif all(torch.equal(server.state[name], tensor) for name, tensor in first.items()):
        notes.append("the global model is still that of before round 1: read personal@own, the models that the clients keep")
    return notes


def pretraining_facts(experiment: Experiment) -> dict[str, Any]:
    """What the server's pre-training came to, where it took any step; the rest of the gain is the rounds'."""
    if (score := experiment.score) is None or (public := experiment.federation.public) is None:
        return {}
    steps = experiment.options.pretrain_steps
    return {"pre-training": {"steps": steps, "examples": len(public.tune), "accuracy": score.accuracy, "loss": score.loss}}


def compare_to_control(measured: Sequence[Row], examples: int) -> list[str]:
    """That the global model is not shown to be better than the server-only control, with what is compared and the spread."""
    if "control@test" not in measured[-1]:
        return []
    names = ("global@test", "control@test")
    ours, control = means = [fmean(row[name] for row in measured[-3:] if name in row) for name in names]
    noise = 2 * math.sqrt(sum(p * (1 - p) for p in means) / examples)
    if ours > control + noise:
        return []
    said = " against ".join(
        f"{name} {p:.1%} ({describe_spread(name, measured[-3:])})" for name, p in zip(names, means, strict=True)
    )
    over = f"the last {len(measured[-3:])} evaluated rounds" if len(measured) > 1 else "the one evaluated round"
    return [
        f"{said}, means over {over}: the difference of {100 * (ours - control):+.1f} points does not exceed the {100 * noise:.1f} "
        f"that {examples:,} test examples leave open (two standard errors): it is not shown that the federation adds anything to "
        "the server-only control (the same model, steps and batches, on the server's data alone)"
    ]


def describe_spread(name: str, rows: Sequence[Row]) -> str:
    """The least and the greatest value of an accuracy in `rows`."""
    found = [row[name] for row in rows if name in row]
    return f"{min(found):.1%} to {max(found):.1%}"


def to_contiguous(state: State) -> State:
    return {name: tensor.contiguous() for name, tensor in state.items()}
