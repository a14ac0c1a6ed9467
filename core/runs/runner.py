"""Runs an experiment into a run folder, or goes on with one."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, cast

from flwr.serverapp import Grid
from safetensors.torch import save

from hetfl.config import RunOptions, write
from hetfl.engines.select import EngineContext
from hetfl.rounds.messages import Row
from hetfl.rounds.reporting import Callback
from hetfl.runs import snapshot
from hetfl.runs.checkpoint import Checkpoints, Snapshot
from hetfl.runs.experiment import Experiment, prepare, resolved
from hetfl.runs.folder import RunFolder
from hetfl.runs.snapshot import Past
from hetfl.runs.summary import class_counts, contiguous, run_facts, summarise

CHECKPOINTS = "checkpoints"


def run(
    options: RunOptions, folder: RunFolder, watch: Callback, moment: Snapshot | None = None, grid: Grid | None = None
) -> dict[str, Any]:
    """Runs an experiment, or the rest of it after `moment`, and fills its folder; returns the summary that `hfl show` prints.

    `grid` is the one of the federation that runs it, where it is deployed.
    """
    began = time.perf_counter()
    experiment = prepare(options, watch, moment, EngineContext(folder.path / "memory", grid))
    if moment is None:
        folder.json("run.json", run_facts(experiment))
        folder.commit()
        folder.table("partition.csv", class_counts(experiment.federation))
        folder.write("config.toml", write(resolved(experiment), experiment.plugins.options()))
    recorder = RunRecorder(folder, experiment, watch)
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


def resume_run(options: RunOptions, folder: RunFolder, watch: Callback) -> dict[str, Any]:
    """Goes on with the run in `folder` from its last whole checkpoint, or from its config where it has none."""
    moment = Checkpoints(folder.path / CHECKPOINTS, options.keep_checkpoints).load(watch.note)
    watch.note(f"going on after round {moment.round}" if moment else "no round had ended: the run begins anew")
    for row in moment.facts.values() if moment else []:
        if isinstance(row, list) and row and isinstance(row[0], dict) and "seconds" in row[0]:
            watch.done(row[0])
    return run(options, folder, watch, moment)


class RunRecorder:
    """Writes each finished round to the folder before it is shown."""

    def __init__(self, folder: RunFolder, experiment: Experiment, watch: Callback) -> None:
        self._folder, self._rounds, self._watch, self._experiment = folder, experiment.rounds, watch, experiment
        self._every, self._past = experiment.options.checkpoint_every, Past()
        self._checkpoints = Checkpoints(folder.path / CHECKPOINTS, experiment.options.keep_checkpoints)

    def begin(self, anew: bool) -> None:
        """The tables as they are so far, and the state before round 1."""
        if self._rounds.rows:
            self._tables()
        if anew and self._every:
            self._checkpoints.save(snapshot.capture(self._experiment, self._past))

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
            self._checkpoints.save(snapshot.capture(self._experiment, self._past))
        self._watch.done(row)

    def _tables(self) -> None:
        self._folder.table("metrics.csv", self._rounds.rows)
        self._folder.table("clients.csv", self._rounds.client_rows)
