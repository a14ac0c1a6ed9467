"""A matrix on a Ray cluster: a cell is a task, whose files come back to the matrix's folder; nodes need not share a disk."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from hetfl.engines.modules import find_own_modules
from hetfl.engines.ray import connect, count_gpus, why_not_begun
from hetfl.errors import UsageError, plural
from hetfl.models.factory import find_factory
from hetfl.runs.cell import Trial
from hetfl.runs.folder import FolderInUseError, MemoryFolder, RunFolder
from hetfl.runs.sweep import fill_folder


def run_on_ray(trials: Sequence[Trial], out: Path) -> Generator[Trial]:
    """Runs each trial as a task with as many cores as its --workers (default 1) and its GPUs; yields each when it has ended.

    A task whose node dies is run again, by Ray, on another one.
    """
    first = trials[0].options
    for name in {str(trial.options.model) for trial in trials if ":" in (trial.options.model or "")}:
        find_factory(name)  # imports it
    modules = sorted({path for trial in trials for path in find_own_modules(trial.options)})
    began = connect(first.ray_address, modules, None)
    try:
        refuse_too_large(trials)
        running = {begin(trial): trial for trial in trials}
        while running:
            for task in ray.wait([*running])[0]:
                trial = running.pop(task)
                keep(task, out / "cells" / trial.name)
                yield trial
    finally:
        if began:
            ray.shutdown()


def refuse_too_large(trials: Sequence[Trial]) -> None:
    """Raises UsageError for a trial that no node of the cluster has room for, however idle; Ray would wait for one for ever."""
    listed: Any = ray.nodes()  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in listed if node["Alive"]]
    for cores, gpus in sorted({(trial.options.workers or 1, count_gpus(trial.options)) for trial in trials}):
        if not any(node.get("CPU", 0) >= cores and node.get("GPU", 0) >= gpus for node in nodes):
            also = f" and {gpus:g} GPU{'s' * (gpus > 1)} (--device cuda, --client-gpus)" if gpus else ""
            raise UsageError(f"no node of the Ray cluster has {plural(cores, 'core')} (--workers){also}")


def begin(trial: Trial) -> ray.ObjectRef[dict[str, bytes]]:
    """Has a node run a trial."""
    cores = trial.options.workers or 1
    task = ray.remote(run_cell).options(num_cpus=cores, num_gpus=count_gpus(trial.options), name=trial.name)
    found: ray.ObjectRef[dict[str, bytes]] = task.remote(trial, cores)
    return found


def run_cell(trial: Trial, workers: int) -> dict[str, bytes]:
    """The files of a trial's folder."""
    folder = MemoryFolder()
    try:
        fill_folder(trial, folder, workers)
        return folder.files()
    finally:
        folder.release()


def keep(task: ray.ObjectRef[dict[str, bytes]], path: Path) -> None:
    """Writes what a task has come to into its cell's folder, the summary last; one that another process has is waited for."""
    try:
        files = ray.get(task)
    except RayError as error:
        why = {"status": "failed", "why": f"the Ray task of this run has failed: {why_not_begun(error)}"}
        files = {"refused.json": json.dumps(why).encode()}
    folder = RunFolder(path)
    while True:
        try:
            folder.open(overwrite=True)
            break
        except FolderInUseError:
            time.sleep(0.5)
    try:
        folder.commit()
        for name in sorted(files, key=lambda name: name in ("summary.json", "refused.json")):
            folder.write(name, files[name])
    finally:
        folder.release()
