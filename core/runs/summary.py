"""What a run came to: accuracies, costs, bytes, warnings."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from hetfl import presets
from hetfl.config import RunOptions, resolve
from hetfl.data.dataset import FederatedDataset
from hetfl.data.kinds import DETAILS, TaskKind
from hetfl.digest import digest_tensors
from hetfl.errors import plural
from hetfl.models.state import State
from hetfl.rounds.history import History, Mean
from hetfl.rounds.rows import (
    BYTES_DOWN,
    BYTES_UP,
    CLIENT_SECONDS,
    CLOCK,
    DROPPED,
    JOULES,
    JOULES_SO_FAR,
    PHASE,
    SECONDS,
    SIMULATED,
    Row,
    is_detail,
    is_of_global,
)  # fmt: skip
from hetfl.runs.cell import NOT_APPLICABLE
from hetfl.runs.experiment import Experiment
from hetfl.runs.folder import BASE_HASH
from hetfl.runs.given import object_facts
from hetfl.runs.versions import PACKAGES, version

REAL = "real: who was merged when is no matter of the seed, and another run is another one"


def run_facts(experiment: Experiment) -> dict[str, Any]:
    """What identifies a run: versions, hashes, who holds what, the width groups."""
    federation, widths, options = experiment.federation, experiment.server.widths, experiment.options
    return {
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        **({"arrivals": REAL} if options.merges_real_arrivals else {}),
        **preset_origin(experiment.given), **object_facts(experiment.given),
        "seed": experiment.options.seed, "partition seed": experiment.options.partition_seed,
        "partition fingerprint": federation.fingerprint, "initial weights sha256": digest_tensors(experiment.initial, shapes=False),
        **({BASE_HASH: base} if (base := experiment.server.builder.base_hash) else {}),
        "task": federation.kind.name, "classes": list(federation.classes), "outputs": federation.inputs.classes,
        "pad": federation.inputs.pad, "input shape": list(federation.shape),
        "examples": {"clients": federation.train_sizes, "own test": federation.test_sizes,
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
    history, trains_global, kind = experiment.state.history, experiment.plugins.trains_global, experiment.federation.kind
    measured, sums = [*history.measured], history.sums
    accuracies = final_accuracies(measured)
    if not trains_global:
        accuracies = {name: values for name, values in accuracies.items() if not is_of_global(name)}
    server = {key.removeprefix(PHASE): sums[key] for key in sorted(sums) if key.startswith(PHASE)}
    return {
        "extract": experiment.options.extract, "aggregate": experiment.options.aggregate,
        "dataset": experiment.federation.dataset, "metric": kind.metric, "rounds": history.rounds,
        "clients": len(experiment.federation.clients), "accuracy": accuracies,
        **pretraining_facts(experiment), "levels": level_costs(history), "seconds": seconds,
        **({} if trains_global else {NOT_APPLICABLE: WITHOUT_GLOBAL}),
        "seconds by phase": {**experiment.seconds, **server},
        "client seconds": sums[CLIENT_SECONDS],
        **time_to_accuracy(history), BYTES_DOWN: sums[BYTES_DOWN], BYTES_UP: sums[BYTES_UP],
        "weights sha256": digest_tensors(experiment.server.state, shapes=False),
        "notes": [*dict.fromkeys(experiment.server.notes), *tell_unsaid(experiment.state.unsaid), *own_notes(experiment),
                  *(compare_to_control(measured, len(experiment.federation.test), kind) if trains_global else [])],
    }  # fmt: skip


def tell_unsaid(count: int) -> list[str]:
    """That there were more notes than are listed."""
    return [f"{plural(count, 'further note')}: metrics.csv (alarms) and clients.csv (fault) have them"] if count else []


def time_to_accuracy(history: History) -> dict[str, Any]:
    """Of a run with --fleet: its simulated seconds and joules, and the seconds until the global model first reached accuracies."""
    if CLOCK not in history.last:
        return {}
    return {
        SIMULATED: history.last[CLOCK], JOULES: history.last[JOULES_SO_FAR], DROPPED: history.sums[DROPPED],
        "simulated seconds to accuracy": dict(sorted(history.reached.items(), key=lambda item: float(item[0]))),
    }  # fmt: skip


def final_accuracies(measured: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Every accuracy of the last evaluated round, and its mean over the last three evaluated rounds, where all of them have it."""
    names = [key for key in measured[-1] if "@" in key and not is_detail(key)]
    return {name: last_values(name, measured) for name in names}


def last_values(name: str, measured: Sequence[Row]) -> dict[str, float]:
    last = [row[name] for row in measured[-3:] if name in row]
    found = {"last": last[-1], **({"last three": sum(last) / len(last)} if len(last) == len(measured[-3:]) else {})}
    extra = {key: measured[-1][f"{name} {key}"] for key in DETAILS if f"{name} {key}" in measured[-1]}
    return {**found, **extra}


WITHOUT_GLOBAL = "no global model is trained here, so its accuracies are not applicable: read personal@own, the clients' own models"


def level_costs(history: History) -> list[dict[str, Any]]:
    """What the clients of each level spent in a round, on average: the papers' tables of memory, time and communication."""
    return [{"level": level} | averages(history.costs[level]) for level in sorted(history.costs, key=float, reverse=True)]


def averages(costs: Mapping[str, Mean]) -> dict[str, float]:
    means = {name: mean.total / mean.count for name, mean in costs.items() if mean.count}
    return {name: value if name == SECONDS else round(value) for name, value in means.items()}


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


def compare_to_control(measured: Sequence[Row], examples: int, kind: TaskKind) -> list[str]:
    """That the global model is not shown to be better than the server-only control, with what is compared and the spread."""
    if "control@test" not in measured[-1]:
        return []
    names = ("global@test", "control@test")
    ours, control = means = [fmean(row[name] for row in measured[-3:] if name in row) for name in names]
    spreads = [kind.spread(p, examples) for p in means]
    noise = 2 * math.sqrt(sum(s for s in spreads if s is not None))
    if ours > control + noise:
        return []
    said = " against ".join(
        f"{name} {p:.1%} ({describe_spread(name, measured[-3:])})" for name, p in zip(names, means, strict=True)
    )
    over = f"the last {len(measured[-3:])} evaluated rounds" if len(measured) > 1 else "the one evaluated round"
    open = f"does not exceed the {100 * noise:.1f} that {examples:,} test examples leave open (two standard errors)"
    return [
        f"{said}, means over {over}: the difference of {100 * (ours - control):+.1f} points "
        f"{'is no gain' if None in spreads else open}: it is not shown that the federation adds anything to "
        "the server-only control (the same model, steps and batches, on the server's data alone)"
    ]


def describe_spread(name: str, rows: Sequence[Row]) -> str:
    """The least and the greatest value of an accuracy in `rows`."""
    found = [row[name] for row in rows if name in row]
    return f"{min(found):.1%} to {max(found):.1%}"


def to_contiguous(state: State) -> State:
    return {name: tensor.contiguous() for name, tensor in state.items()}
