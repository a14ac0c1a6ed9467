"""Many runs as one experiment: every pair, every value, every seed."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import shutil
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing, suppress
from dataclasses import replace
from multiprocessing import get_context, resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pebble import ProcessExpired, ProcessPool

from hetfl import config, registry
from hetfl.errors import FOREIGN, NotApplicable, RunError, UsageError, unknown
from hetfl.parallel import end_with_parent, hold_interrupts
from hetfl.presets import assign
from hetfl.runs.cell import WITHOUT_EFFECT, Trial, TrialResult, result_row
from hetfl.runs.folder import FolderInUseError, RunFolder

if TYPE_CHECKING:
    from hetfl.runs.checkpoint import Snapshot

CHECKPOINTS = 20  # of a trial; one of fewer rounds has none

MOST_WAIT = 3600.0  # seconds at a time, far below what a lock can be told to wait

FIXED = {"extract", "aggregate", "seed", *WITHOUT_EFFECT}  # and those that a sweep has options of its own for


def cross_plugins(extract: Sequence[str], aggregate: Sequence[str], controls: bool = True) -> list[tuple[str, str]]:
    """The pairs to run: the cross product, `all` and `natural` spelt out, with the `controls` behind it.

    Strategies for adapters are not among all: they are named.
    """
    known = registry.entries("extract")
    names = [e.name for e in known if e.any_model and not e.control] if list(extract) == ["all"] else list(extract)
    partners = [e.name for e in registry.entries("aggregate") if e.any_model] if list(aggregate) == ["all"] else list(aggregate)
    for partner in partners:
        if partner != "natural":
            registry.find("aggregate", partner)
    found = [(e, registry.partner_of(e) if a == "natural" else a) for e in names for a in partners]
    return list(dict.fromkeys([*found, *((e.name, registry.partner_of(e.name)) for e in known if e.control and controls)]))


def plan_trials(
    base: Mapping[str, Any], pairs: Sequence[tuple[str, str]], sweep: Mapping[str, Sequence[Any]], seeds: Sequence[int]
) -> list[Trial]:
    """Every pair at every point of the sweep with every seed. Raises UsageError for options that no run could have."""
    found = []
    for (extract, aggregate), values in itertools.product(pairs, itertools.product(*sweep.values())):
        point = tuple(zip(sweep, values, strict=True))
        for seed in seeds:
            options = {**base, "extract": extract, "aggregate": aggregate, "seed": seed}
            for name, value in point:
                set_option(options, name, value)
            options["set"] = settings_of_chosen(options)
            found.append(Trial(point, config.resolve({k: v for k, v in options.items() if v is not None})))
    return found


def set_option(options: dict[str, Any], name: str, value: Any) -> None:
    """Sets a swept option: one of the run (also as data.public, train.lr …), or plugin.option."""
    group, _, rest = name.partition(".")
    plain = {"public": "server_data"}.get(rest, rest) if group in ("data", "train", "server", "run") else name.replace("-", "_")
    if plain in FIXED:
        raise UsageError(f"'{plain}' is not swept: it has its own option, or changes no result")
    if "." in plain:
        options["set"] = assign(options.get("set", {}), name.split("."), value)
        return
    try:
        config.check_option(plain)
    except UsageError as error:
        raise UsageError(f"--sweep {name}: {error}") from error
    options[plain] = value


def settings_of_chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of the plugin options given for the whole sweep those whose plugin this run has. Raises UsageError for an unknown plugin."""
    given: Mapping[str, Any] = options.get("set", {})
    asked = [(role, options[role]) for role in ("extract", "aggregate")] + [("profile", options.get("profile", "levels"))]
    chosen = [registry.find(role, str(name)) for role, name in [*asked, *(("wrap", w) for w in options.get("wrap", ()))]]
    names, known = {e.name for e in chosen}, {e.name for e in registry.entries()}
    found: dict[str, Any] = {}
    for name, values in given.items():
        if name in registry.ROLES and isinstance(values, Mapping):
            mine = {n: v for n, v in values.items() if n not in known or any((e.role, e.name) == (name, n) for e in chosen)}
            found |= {name: mine} if mine else {}
        elif name in names or not isinstance(values, Mapping):  # what names no plugin is refused as in a run
            found[name] = values
        elif name not in known:
            raise unknown("plugin", name, known | names)
    return found


def refuse_bad(trials: Sequence[Trial]) -> None:
    """What every trial would be refused for is refused at once: an unknown data set, a bad plugin option."""
    from hetfl.data import catalog
    from hetfl.hooks.loading import load_plugins

    for dataset in dict.fromkeys(trial.options.dataset for trial in trials):
        catalog.find_dataset(dataset)
    for trial in {(trial.extract, trial.aggregate, trial.point): trial for trial in trials}.values():
        with suppress(NotApplicable):
            load_plugins(trial.options)


Elsewhere = Callable[[Sequence[Trial], Path], Generator[Trial]]  # runs trials, and yields each when its folder says how it ended


def run_trials(
    trials: Sequence[Trial], out: Path, jobs: int, elsewhere: Elsewhere | None = None, until: float = math.inf
) -> Iterator[TrialResult]:
    """Runs what is not yet in `out` or failed, `jobs` processes at a time or `elsewhere`; yields every trial's result as it is
    known. Processes here are stopped when `time.monotonic()` is `until`."""
    waiting: dict[str, list[Trial]] = {}  # a swept option that a pair does not have leaves it one run for several trials
    for trial in trials:
        known = read_result(out, trial)
        if known is None or known.status == "failed":
            waiting.setdefault(trial.name, []).append(trial)
        else:
            yield known
    if not waiting:
        return
    todo = [same[0] for same in waiting.values()]
    running = elsewhere(todo, out) if elsewhere else run_in_processes(todo, out, jobs, until)
    with closing(running):
        for ended in running:
            for trial in waiting[ended.name]:
                result = read_result(out, trial)
                assert result is not None
                yield replace(result, cached=False)


def run_in_processes(trials: Sequence[Trial], out: Path, jobs: int, until: float = math.inf) -> Generator[Trial]:
    """Runs trials, `jobs` processes at a time; yields each when its folder says how it ended. What then runs is stopped `until`."""
    resource_tracker.ensure_running()
    pool = ProcessPool(jobs, context=get_context("spawn"), initializer=begin_worker, initargs=(os.getpid(),))
    try:
        with hold_interrupts():  # the processes begun here get no SIGINT: this one ends them
            futures: dict[Future[bool], Trial] = {pool.schedule(run_trial, (trial, out, jobs, False)): trial for trial in trials}
        while futures:
            done, _ = wait(futures, min(max(0.0, until - time.monotonic()), MOST_WAIT), FIRST_COMPLETED)
            if not done and time.monotonic() >= until:
                return
            for future in done:
                trial = futures.pop(future)
                if end_of(future, trial, out):
                    yield trial
                else:  # another process has the cell: the others first
                    futures[pool.schedule(run_trial, (trial, out, jobs, True))] = trial
    finally:
        pool.stop()  # type: ignore[no-untyped-call]
        pool.join()


def begin_worker(parent: int) -> None:
    """A worker ends with the matrix that began it, however that ended, and lets go of its cell."""
    if os.getppid() != parent:
        os._exit(1)
    end_with_parent()


def end_of(future: Future[bool], trial: Trial, out: Path) -> bool:
    """Whether a trial has ended; where its process did not answer, that is written into its folder as its failure."""
    try:
        return future.result()
    except ProcessExpired as error:
        folder = RunFolder(out / "cells" / trial.name)
        folder.json("refused.json", {"status": "failed", "why": f"the process of this run ended with code {error.exitcode}"})
        return True


def run_trial(trial: Trial, out: Path, jobs: int, wait_for_others: bool) -> bool:
    """Runs one trial in its folder under `out`, in a process of its own with its share of the cores.

    Where another process has the folder: False, or with `wait_for_others` what that one makes of it.
    """
    from hetfl.parallel import cores

    folder = RunFolder(out / "cells" / trial.name)
    while True:
        try:
            begun = take_folder(folder)
            break
        except FolderInUseError:
            if not wait_for_others:
                return False
            time.sleep(0.5)
            if has_ended(out, trial):
                return True
    try:
        folder.commit()
        fill_folder(trial, folder, max(1, cores() // jobs), trial.options.rounds // CHECKPOINTS, begun)
    finally:
        folder.release()
    return True


def take_folder(folder: RunFolder) -> bool:
    """Takes a trial's folder; whether a run lies there that was stopped or killed and may go on. Raises FolderInUseError.

    One that failed begins anew: it would fail again, or what made it fail has been changed.
    """
    from hetfl.runs.checkpoint import find_manifests

    ended = folder.holds("summary.json") or folder.holds("traceback.txt")
    if not ended and find_manifests(folder.path / "checkpoints"):
        folder.lock()
        (folder.path / "refused.json").unlink(missing_ok=True)
        return True
    folder.open(overwrite=True)
    return False


def fill_folder(trial: Trial, folder: RunFolder, workers: int | None, checkpoint_every: int = 0, begun: bool = False) -> None:
    """Runs one trial, or the rest of one that has `begun`; its folder then holds a summary, or why there is none."""
    from hetfl.rounds.reporting import NoCallback
    from hetfl.runs import runner

    here = {name: getattr(trial.options, name) for name in WITHOUT_EFFECT}
    unused = {} if trial.options.engine == "ray" else dict.fromkeys(config.FOR_RAY)  # they were for the task that runs it
    here |= {"workers": workers, "checkpoint_every": checkpoint_every, **unused}
    try:
        options, snapshot = find_snapshot(trial.options, folder) if begun else (trial.options, None)
        runner.run(options.model_copy(update=here), folder, NoCallback(), snapshot)
    except NotApplicable as error:
        folder.json("refused.json", {"status": "not applicable", "why": str(error).removeprefix("not applicable: ")})
    except Exception as error:
        why = str(error) if isinstance(error, RunError | UsageError) else f"{type(error).__name__}: {error}"
        folder.write("traceback.txt", traceback.format_exc())
        folder.json("refused.json", {"status": "failed", "why": why})
        return  # its checkpoints stay for hfl resume
    shutil.rmtree(folder.path / runner.CHECKPOINTS, ignore_errors=True)


def find_snapshot(options: config.RunOptions, folder: RunFolder) -> tuple[config.RunOptions, Snapshot | None]:
    """The options with which a run that was stopped began, those of plugins spelt out, and where it goes on.

    `options` and None where it begins anew: no checkpoint is whole, or it was of other versions.
    """
    from hetfl.rounds.reporting import NoCallback
    from hetfl.runs import runner

    with suppress(UsageError, RunError, *FOREIGN):
        began = config.resolve(folder.settings())
        snapshot = runner.load_snapshot(began, folder, NoCallback())
        runner.refuse_changed(snapshot, began, folder, force=False)
        return (began, snapshot) if snapshot else (options, None)
    return options, None


def read_result(out: Path, trial: Trial) -> TrialResult | None:
    """What `out` holds of a trial; None where it has not ended."""
    return read_folder(RunFolder(out / "cells" / trial.name), trial)


def has_ended(out: Path, trial: Trial) -> bool:
    """Whether `out` holds the result of a trial that did not fail."""
    found = read_result(out, trial)
    return found is not None and found.status != "failed"


def read_others(out: Path, trials: Sequence[Trial]) -> list[TrialResult]:
    """What matrix.csv in `out` has of trials other than these, from their folders: an earlier, larger selection stays."""
    if not (out / "matrix.csv").exists():
        return []
    with (out / "matrix.csv").open(newline="") as file:
        table = csv.DictReader(file)
        rows, columns = list(table), list(table.fieldnames or ())
    names = columns[columns.index("aggregate") + 1 : columns.index("seed")]  # what was swept
    known: dict[str, list[set[tuple[str, str]]]] = {}
    for trial in trials:
        known.setdefault(trial.key, []).append({(name, str(value)) for name, value in trial.point})
    found = []
    for row in rows:
        point = tuple((name, read_value(row[name])) for name in names if row[name])
        if any({(name, str(value)) for name, value in point} <= asked for asked in known.get(row["config"], ())):
            continue
        (folder, *_) = [*out.glob(f"cells/*-{row['config']}"), None]
        values = config.read_run_file(folder / "config.toml") if folder and (folder / "config.toml").exists() else {}
        result = read_folder(RunFolder(folder), Trial(point, config.resolve(values))) if folder and values else None
        if result is not None:
            found.append(replace(result, row=result.row | {"config": row["config"]}))
    return found


def read_value(text: str) -> Any:
    """A swept value as matrix.csv has it: a number, true, false, a list or text."""
    with suppress(ValueError):
        return json.loads(text)
    return text


def read_folder(folder: RunFolder, trial: Trial) -> TrialResult | None:
    """What a trial's folder holds; None where it has not ended. Raises UsageError for one that is damaged."""
    for name in ("refused.json", "summary.json"):
        if folder.holds(name):
            try:
                found = folder.read(name)
                return TrialResult(trial, found.get("status", "ok"), result_row(trial, found), cached=True)
            except (UsageError, *FOREIGN) as error:
                why = f"{name} is not what a run leaves"
                raise UsageError(f"the run in '{folder.path}' is damaged: {why}; delete that folder to run it again") from error
    return None
