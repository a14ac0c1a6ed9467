"""A whole run, put together: data, model, width groups, plugins, rounds, and what is left in the run folder."""

from __future__ import annotations

import copy
import hashlib
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from flwr.serverapp import Grid
from safetensors.torch import save
from torch import nn

from hetfl.core import cohorts, engines, ground, presets, resume, roles
from hetfl.core.apps import Site
from hetfl.core.checkpoint import Checkpoints, Moment
from hetfl.core.config import RunOptions, resolve, write
from hetfl.core.data import Federation
from hetfl.core.engines import Surroundings
from hetfl.core.grid import LocalGrid
from hetfl.core.intake import Row
from hetfl.core.meter import Meter
from hetfl.core.pool import Pool
from hetfl.core.record import Folder
from hetfl.core.remote import RemoteGrid
from hetfl.core.rounds import Rounds, Watch
from hetfl.core.server import Server
from hetfl.core.widths import State, tensors

CHECKPOINTS = "checkpoints"
PACKAGES = ("hetfl", "torch", "flwr", "flwr-datasets", "datasets", "pluggy", "pydantic")


@dataclass(eq=False)
class Experiment:
    """Everything a run needs, ready to go; `initial` are the weights before any training, `pretrained` those after the server's."""

    options: RunOptions
    federation: Federation
    plugins: roles.Roles
    server: Server
    rounds: Rounds
    initial: State
    pretrained: State
    meter: Meter
    cohort: int
    seconds: dict[str, float]
    grid: LocalGrid | RemoteGrid = field(init=False)

    def close(self) -> None:
        """Ends the workers."""
        self.grid.close()
        self.server.pool.close()


def prepare(options: RunOptions, watch: Watch, moment: Moment | None = None, where: Surroundings | None = None) -> Experiment:
    """Loads plugins, data and model, traces the widths and pre-trains; with `moment`, the run is what it was then.

    `where` says where clients in other processes are.


    Raises UsageError for what cannot work together.
    """
    common, pool = ground.laid(options, watch), Pool(options.workers)
    federation, workshop, plugins = common.federation, common.workshop, common.plugins
    initial = tensors(workshop.model)
    server = Server(options, workshop, initial, len(federation.classes), federation.public, pool)
    began = time.perf_counter()
    watch.phase(0, "pretrain")
    if moment is not None:
        server.state = moment.tensors["pretrained"]
    elif server.has_public:
        server.state = server.trained(initial, options.pretrain_steps, "pretrain")
    pretrained = server.state
    plugins.prepare(server)
    desk = engines.desk(options)
    rounds = Rounds(server, plugins, desk, federation.test, len(federation.clients), watch, common.meter)
    site = common.site(desk)
    cohort, why = cohort_size(site, workshop.model)
    if why and options.cohorts == "on":
        server.notes.append(f"clients train one by one, not in cohorts: {why}")
    seconds = {"pretrain": time.perf_counter() - began}
    made = Experiment(options, federation, plugins, server, rounds, initial, pretrained, common.meter, cohort, seconds)
    made.grid = engines.grid(site, pool, cohort, write(resolved(made), plugins.options()), where or Surroundings(Path("memory")))
    if moment is not None:
        resume.given_back(made, moment)
    return made


def cohort_size(site: Site, model: nn.Module) -> tuple[int, str | None]:
    """How many clients train as one, and why no more than one where that is so."""
    if site.options.engine != "local":
        return 1, f"the engine '{site.options.engine}' has each client by itself"
    if not site.roles.plain_fit:
        return 1, "a plugin takes part in local training"
    size = cohorts.size(model, site.options, site.federation.shape, site.workshop.widths.draws)
    if size < 2:
        return 1, "the model draws random numbers or is recurrent"
    test = site.federation.test
    why = cohorts.stackable(copy.deepcopy(model), test.x[test.index[:2]].cpu())
    return (1, why) if why else (size, None)


def run(
    options: RunOptions, folder: Folder, watch: Watch, moment: Moment | None = None, grid: Grid | None = None
) -> dict[str, Any]:
    """Runs an experiment, or the rest of it after `moment`, and fills its folder; returns the summary that `hfl show` prints.

    `grid` is the one of the federation that runs it, where it is deployed.
    """
    began = time.perf_counter()
    experiment = prepare(options, watch, moment, Surroundings(folder.path / "memory", grid))
    if moment is None:
        folder.json("run.json", facts(experiment))
        folder.table("partition.csv", holdings(experiment.federation))
        folder.write("config.toml", write(resolved(experiment), experiment.plugins.options()))
    recorder = Recorder(folder, experiment, watch)
    experiment.rounds.watch = recorder
    try:
        recorder.begin(moment is None)
        experiment.grid.drive(partial(experiment.rounds.start, cast(Grid, experiment.grid)))
    finally:
        experiment.close()
    folder.write("weights.safetensors", save(contiguous(experiment.server.state)))
    summary = summarise(experiment, time.perf_counter() - began)
    folder.json("summary.json", summary)
    return summary


def went_on(options: RunOptions, folder: Folder, watch: Watch) -> dict[str, Any]:
    """Goes on with the run in `folder` from its last whole checkpoint, or from its config where it has none."""
    moment = Checkpoints(folder.path / CHECKPOINTS, options.keep_checkpoints).load(watch.note)
    watch.note(f"going on after round {moment.round}" if moment else "no round had ended: the run begins anew")
    for row in moment.facts.values() if moment else []:
        if isinstance(row, list) and row and isinstance(row[0], dict) and "seconds" in row[0]:
            watch.done(row[0])
    return run(options, folder, watch, moment)


class Recorder:
    """Writes each finished round to the folder before it is shown."""

    def __init__(self, folder: Folder, experiment: Experiment, watch: Watch) -> None:
        self._folder, self._rounds, self._watch, self._experiment = folder, experiment.rounds, watch, experiment
        self._every, self._past = experiment.options.checkpoint_every, resume.Past()
        self._checkpoints = Checkpoints(folder.path / CHECKPOINTS, experiment.options.keep_checkpoints)

    def begin(self, anew: bool) -> None:
        """The tables as they are so far, and the state before round 1."""
        if self._rounds.rows:
            self._tables()
        if anew and self._every:
            self._checkpoints.save(resume.taken(self._experiment, self._past))

    def phase(self, round: int, name: str) -> None:
        self._watch.phase(round, name)

    def note(self, text: str) -> None:
        self._rounds.server.notes.append(text)
        self._watch.note(text)

    def alarm(self, text: str) -> None:
        self._rounds.server.notes.append(f"ALARM: {text}")
        self._watch.alarm(text)

    def done(self, row: Row) -> None:
        self._tables()
        if self._every and (row["round"] % self._every == 0 or row["round"] == self._rounds.options.rounds):
            self._checkpoints.save(resume.taken(self._experiment, self._past))
        self._watch.done(row)

    def _tables(self) -> None:
        self._folder.table("metrics.csv", self._rounds.rows)
        self._folder.table("clients.csv", self._rounds.client_rows)


def resolved(experiment: Experiment) -> RunOptions:
    """The options with every default that depended on the data or the plugins spelt out."""
    cohorts = "on" if experiment.cohort > 1 else "off"
    return ground.settled(experiment.options, experiment.federation, experiment.plugins, experiment.rounds.policy, cohorts)


def facts(experiment: Experiment) -> dict[str, Any]:
    """What identifies a run: versions, hashes, who holds what, the width groups."""
    federation, widths = experiment.federation, experiment.server.widths
    return {
        "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        **origin(experiment.options), "seed": experiment.options.seed, "partition seed": experiment.options.partition_seed,
        "partition fingerprint": federation.fingerprint, "initial weights sha256": digest(experiment.initial),
        "classes": list(federation.classes), "input shape": list(federation.shape),
        "examples": {"clients": [len(c.train) for c in federation.clients], "own test": [len(c.test) for c in federation.clients],
                     "tune": len(federation.public.tune) if federation.public else 0,
                     "holdout": len(federation.public.holdout) if federation.public else 0, "test": len(federation.test)},
        "counts": federation.counts.tolist(),
        "widths": {g.name: g.size for g in widths.groups}, "frozen": widths.frozen, "elastic share": widths.elastic(),
    }  # fmt: skip


def origin(options: RunOptions) -> dict[str, Any]:
    """The preset that a run began from, the hash of its settings, and which of them the run changed."""
    if options.preset is None:
        return {}
    preset, now = presets.find(options.preset), options.model_dump(mode="json")
    asked = resolve({**preset.values, "preset": preset.name}).model_dump(mode="json")
    changed = [name for name in preset.values if now[name] != asked[name]]
    return {"preset": {"name": preset.name, "sha256": preset.digest, "changed": changed}}


def holdings(federation: Federation) -> list[Row]:
    """Who holds what: a row a client, training examples of every class and in all."""
    rows = enumerate(federation.counts.tolist())
    return [{"client": i, **dict(zip(federation.classes, row, strict=True)), "all": sum(row)} for i, row in rows]


def summarise(experiment: Experiment, seconds: float) -> dict[str, Any]:
    """What a run came to: last accuracies, sizes per level, bytes, where the time went, and what to beware of."""
    rows = experiment.rounds.rows
    measured = [row for row in rows if "global@test" in row]
    phases = sorted({key for row in rows for key in row if key.startswith("seconds ")})
    server = {key.removeprefix("seconds "): sum(row.get(key, 0.0) for row in rows) for key in phases}
    return {
        "extract": experiment.options.extract, "aggregate": resolved(experiment).aggregate,
        "dataset": experiment.federation.dataset, "rounds": len(rows), "clients": len(experiment.federation.clients),
        "accuracy": final(measured), "levels": sizes(experiment), "seconds": seconds,
        "seconds by phase": {**experiment.seconds, **server},
        "client seconds": sum(row["client seconds"] for row in rows),
        "bytes down": sum(row["bytes down"] for row in rows), "bytes up": sum(row["bytes up"] for row in rows),
        "weights sha256": digest(experiment.server.state),
        "notes": [*dict.fromkeys(experiment.server.notes), *spared(experiment), *unmoved(experiment), *warnings(measured)],
    }  # fmt: skip


def final(measured: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Every accuracy of the last evaluated round, and its mean over the last three evaluated rounds."""
    names = [key for key in measured[-1] if "@" in key and not key.endswith((" loss", " p10"))]
    return {name: values(name, measured) for name in names}


def values(name: str, measured: Sequence[Row]) -> dict[str, float]:
    last = [row[name] for row in measured[-3:] if name in row]
    found = {"last": last[-1], "last three": sum(last) / len(last)}
    extra = {key: measured[-1][f"{name} {key}"] for key in ("loss", "p10") if f"{name} {key}" in measured[-1]}
    return {**found, **extra}


SPENT = ("parameters", "MACs", "memory", "bytes down", "bytes up", "seconds")


def sizes(experiment: Experiment) -> list[dict[str, Any]]:
    """What the clients of each level spent in a round, on average: the papers' tables of memory, time and communication."""
    rows = [row for row in experiment.rounds.client_rows if "fault" not in row]
    levels = sorted({row["level"] for row in rows}, key=float, reverse=True)
    return [{"level": level} | averages([row for row in rows if row["level"] == level]) for level in levels]


def averages(rows: Sequence[Row]) -> dict[str, float]:
    found = {name: [row[name] for row in rows if name in row] for name in SPENT}
    means = {name: sum(values) / len(values) for name, values in found.items() if values}
    return {name: value if name == "seconds" else round(value) for name, value in means.items()}


def spared(experiment: Experiment) -> list[str]:
    """What early stopping on the hold-out left out of tuning."""
    steps, epochs = (sum(part) for part in zip(*experiment.server.saved, strict=True)) if experiment.server.saved else (0, 0)
    taken = sum(experiment.server.spent)
    return [f"early stopping on the hold-out saved {steps} of {steps + taken} server steps ({epochs:.1f} epochs)"] if steps else []


def unmoved(experiment: Experiment) -> list[str]:
    """Where the clients keep their models, the global one stays what it was."""
    now, first = experiment.server.state, experiment.rounds.first
    if not all(torch.equal(now[name], tensor) for name, tensor in first.items()):
        return []
    return ["the global model is still that of before round 1: read personal@own, the models that the clients keep"]


def warnings(measured: Sequence[Row]) -> list[str]:
    """What a reader of the result should know before believing it."""
    if "control@test" not in measured[-1]:
        return []
    ours, control = (values(name, measured)["last three"] for name in ("global@test", "control@test"))
    if ours > control + 0.01:
        return []
    return [
        f"global accuracy ({ours:.1%}) does not exceed the server-only control ({control:.1%}, same model and steps on the "
        "server's data alone): the federation adds nothing that can be measured here"
    ]


def contiguous(state: State) -> State:
    return {name: tensor.contiguous() for name, tensor in state.items()}


def digest(state: State) -> str:
    """SHA-256 over names and values; equal weights have equal digests."""
    found = hashlib.sha256()
    for name, tensor in state.items():
        found.update(name.encode())
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()
