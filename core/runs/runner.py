"""Runs an experiment into a run folder, or goes on with one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from safetensors.torch import save

from hetfl.config import RunOptions, format_run_file
from hetfl.engines.select import EngineContext
from hetfl.errors import RunError, UsageError, foreign
from hetfl.rounds.history import History
from hetfl.rounds.loop import run_rounds
from hetfl.rounds.reporting import Callback
from hetfl.rounds.rows import ROUND, SECONDS, Row
from hetfl.runs.checkpoint import Checkpoints, Snapshot
from hetfl.runs.experiment import Experiment, prepare
from hetfl.runs.folder import BASE_HASH, FILE_HASH, WEIGHTS, RunFolder
from hetfl.runs.journal import Round
from hetfl.runs.snapshot import capture, describe_changes, restore
from hetfl.runs.summary import class_counts, run_facts, summarise, to_contiguous

if TYPE_CHECKING:
    from flwr.serverapp import Grid

CHECKPOINTS = "checkpoints"


def run(
    options: RunOptions, folder: RunFolder, callback: Callback, snapshot: Snapshot | None = None, grid: Grid | None = None,
    changed: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Runs an experiment, or the rest of it after `snapshot`, and fills its folder; returns the summary that `hfl show` prints.

    `grid` is the one of the federation that runs it, where it is deployed; `changed` is noted of a run that goes on otherwise than
    it began.
    """
    began = time.perf_counter() - (sum(row[SECONDS] for row, _ in snapshot.rounds) if snapshot else 0.0)
    context = EngineContext(folder.path / "memory", grid, snapshot.round + 1 if snapshot else 1)
    experiment = prepare(options, callback, context, snapshot.tensors["pretrained"] if snapshot else None)
    recorder = RunRecorder(folder, experiment, callback)
    experiment.state.callback = recorder
    try:
        if snapshot is None:
            folder.json("run.json", run_facts(experiment))
            folder.table("partition.csv", class_counts(experiment.federation))
            folder.write("config.toml", format_run_file(experiment.options, experiment.plugins.options()))
        else:
            restore(experiment, snapshot)
            experiment.server.notes += [f"went on after round {snapshot.round} although {change}" for change in changed]
        folder.commit()
        recorder.begin(snapshot)
        experiment.engine.drive(partial(run_rounds, experiment.state, experiment.engine))
    finally:
        experiment.close()
    base = experiment.server.builder.base_hash
    weights = save(to_contiguous(experiment.server.state), {BASE_HASH: base} if base else None)
    folder.write(WEIGHTS, weights)
    summary = summarise(experiment, time.perf_counter() - began) | {FILE_HASH: hashlib.sha256(weights).hexdigest()}
    folder.json("summary.json", summary)
    refuse_untaken(experiment.state.history)
    return summary


def refuse_untaken(history: History) -> None:
    """Raises RunError where clients were asked and no round's replies became the next global model."""
    if not history.asked or history.taken:
        return
    fault, why = history.first_fault, history.first_alarm or history.first_fault or "?"
    if fault and history.faults == history.replies:
        raise RunError(f"every client failed in every round, so the global model was never trained; the first, {fault}")
    raise RunError(f"no round's replies became the global model, which was never trained; the first: {why}")


def resume_run(options: RunOptions, folder: RunFolder, callback: Callback, force: bool = False) -> dict[str, Any]:
    """Goes on with the run in `folder` from its last whole checkpoint, or from its config where it has none.

    Raises UsageError where options or versions are others than it began with, unless `force`.
    """
    snapshot = load_snapshot(options, folder, callback)
    changed = refuse_changed(snapshot, options, folder, force)
    with foreign(f"the journal in '{folder.path}'"):
        for row, _ in snapshot.rounds if snapshot else ():
            callback.done(row)
    return run(options, folder, callback, snapshot, changed=changed)


def refuse_changed(snapshot: Snapshot | None, options: RunOptions, folder: RunFolder, force: bool) -> list[str]:
    """What is not as it was when the run in `folder` began. Raises UsageError where there is anything, unless `force`."""
    changed = describe_changes(snapshot, options) if snapshot else []
    if changed and not force:
        raise UsageError(
            f"this is not the run that began in '{folder.path}': {'; '.join(changed)}; change that back, or go on all the same "
            "with --force, which is noted in the summary"
        )
    return changed


def load_snapshot(options: RunOptions, folder: RunFolder, callback: Callback) -> Snapshot | None:
    """The last whole checkpoint of a run; None where it has none and begins anew."""
    snapshot = Checkpoints(folder.path / CHECKPOINTS, options.keep_checkpoints).load(callback.note)
    callback.note(f"going on after round {snapshot.round}" if snapshot else "no round had ended: the run begins anew")
    return snapshot


class RunRecorder:
    """Writes each finished round to the folder before it is shown."""

    def __init__(self, folder: RunFolder, experiment: Experiment, callback: Callback) -> None:
        self._folder, self._state, self._callback, self._experiment = folder, experiment.state, callback, experiment
        self._every, self._unsaved = experiment.options.checkpoint_every, list[Round]()
        self._checkpoints = Checkpoints(folder.path / CHECKPOINTS, experiment.options.keep_checkpoints)

    def begin(self, snapshot: Snapshot | None) -> None:
        """The tables as they are so far, and the state before round 1 or after `snapshot`."""
        self._folder.restart_tables()
        for row, people in snapshot.rounds if snapshot else ():
            self._tables(row, people)
        if self._every:
            self._checkpoints.begin(snapshot)
            if snapshot is None:
                self._checkpoints.save(capture(self._experiment))

    def phase(self, round: int, name: str) -> None:
        self._callback.phase(round, name)

    def fact(self, text: str) -> None:
        self._callback.fact(text)

    def note(self, text: str) -> None:
        self._state.server.notes.append(text)
        self._callback.note(text)

    def alarm(self, text: str) -> None:
        self._state.server.notes.append(f"ALARM: {text}")
        self._callback.alarm(text)

    def done(self, row: Row) -> None:
        people = [*self._state.client_rows]
        self._state.rows.clear()
        self._state.client_rows.clear()
        self._tables(row, people)
        if self._every:
            self._unsaved.append((row, people))
            if row[ROUND] % self._every == 0 or row[ROUND] == self._state.options.rounds:
                self._checkpoints.save(capture(self._experiment), self._unsaved)
                self._unsaved.clear()
        self._callback.done(row)

    def _tables(self, row: Row, people: Sequence[Row]) -> None:
        self._folder.append("metrics.csv", [row])
        self._folder.append("clients.csv", people)
