"""`hetfl.run`, `load`, `resume` and `matrix`: what the command line does, for a program or a notebook."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hetfl import config, presets
from hetfl.config import RunOptions
from hetfl.errors import UsageError, nearest
from hetfl.runs import leaderboard, runner
from hetfl.runs import sweep as sweeps
from hetfl.runs.cell import Trial, TrialResult, check_metric
from hetfl.runs.folder import MemoryFolder, RunFolder
from hetfl.runs.given import Given
from hetfl.runs.observers import Observers, progress_line
from hetfl.runs.process import for_programs, own_settings
from hetfl.runs.result import Matrix, Run

OBJECTS = {"model", "data", "extract", "aggregate", "profile", "select", "wrap"}  # what may be given as an object


@for_programs
def run(
    *, model: Any = None, data: Any = None, extract: Any = None, aggregate: Any = None, profile: Any = None, select: Any = None,
    wrap: Any = None, callback: Any = None, progress: bool | str = "auto", out: str | Path | None = None, **options: Any,
) -> Run:  # fmt: skip
    """Runs one experiment and returns what came of it; nothing is written unless `out` names a folder.

    `model`: a name (docs/models.md), an nn.Module, of which a copy is trained from the weights that it has, or a factory,
    called with those of classes, channels, size, vocab, length and inputs that its signature names. `data`: a name or path
    (docs/data.md), a torch Dataset (each example is taken once, transforms and all), a pair (x, y), a datasets.Dataset, or
    {"train": …, "test": …} of these. `extract`, `aggregate`, `profile`, `select`, `wrap` (one or several): a name,
    "package.module:Class", a Plugin class or an object of one. `callback`: an object, or several, with any of the methods
    on_run_start(info), on_round_start(round), on_phase(round, name), on_round_end(row), on_fact(text), on_note(text),
    on_alarm(text), on_run_end(summary). `progress`: True, False, or "auto", a line in a terminal or a notebook. Everything else
    is an option of `hfl run`; options of plugins are given as `set={"fedconv": {"epochs": 3}}`. Raises UsageError, in one
    sentence, for what cannot be done as asked.

    Examples:
        >>> import hetfl, torch
        >>> run = hetfl.run(extract="heterofl", model="mlp", limit=200, clients=3, rounds=2, control=False)
        >>> run.metrics["round"].tolist()
        [1, 2]
        >>> x = torch.zeros(1, 1, 8, 8)
        >>> run.model(x).shape, run.submodel(0.5)(x).shape
        (torch.Size([1, 10]), torch.Size([1, 10]))
    """
    given, chosen = Given(), {"extract": extract, "aggregate": aggregate, "profile": profile, "select": select, "wrap": wrap}
    asked = config.resolve(gather(given, options, model=model, dataset=data, out=out, **chosen))
    given.refuse_elsewhere(asked.engine)
    if asked.engine == "flower":
        raise UsageError("the engine 'flower' is for exported apps: use hfl federate, or hfl export flower and flwr run")
    if asked.out is None:
        folder: RunFolder = MemoryFolder()
        asked = asked.model_copy(update={"checkpoint_every": 0})
    else:
        folder = RunFolder(asked.out).open(asked.overwrite)
        folder.write("config.toml", config.format_run_file(asked))
    try:
        carry_out(runner.run, asked, folder, callback, progress)
    except UsageError:
        folder.discard()
        raise
    return Run(folder, given)


@for_programs
def load(path: str | Path, **objects: Any) -> Run:
    """The run in a folder, as `run` returned it: one that has ended, or the rounds so far of one that is under way.

    `model` and `submodel` need what was given to the run as an object once more, such as `model=net`, whose weights do not matter.

    Examples:
        >>> import hetfl
        >>> run = hetfl.run(extract="heterofl", model="mlp", limit=200, clients=3, rounds=1, out="runs/a")
        >>> hetfl.load("runs/a").metrics.equals(run.metrics)
        True
    """
    folder = RunFolder(Path(path))
    folder.require_run()
    if not folder.bytes_of("config.toml"):
        raise UsageError(f"the run in '{path}' was killed before its options were written; start it again")
    for name in objects.keys() - OBJECTS:
        raise UsageError(f"'{name}' is nothing to be given again{nearest(name, OBJECTS)}")
    given, values = Given(), {"dataset" if name == "data" else name: value for name, value in objects.items()}
    return Run(folder, given, given.names(values, Run(folder).options))


@for_programs
def resume(
    path: str | Path, *, callback: Any = None, progress: bool | str = "auto", force: bool = False, **objects: Any
) -> Run:  # fmt: skip
    """Goes on with a run that was stopped, from its last checkpoint; the result is that of a run never stopped.

    Where options or versions are others than it began with it is refused, unless `force`, which is noted. What the run was given
    as an object is given again, such as `model=net`. A run that has ended is returned as it is.

    Examples:
        >>> import hetfl
        >>> run = hetfl.run(extract="heterofl", model="mlp", limit=200, clients=3, rounds=1, out="runs/b")
        >>> hetfl.resume("runs/b").summary == run.summary
        True
    """
    found, folder = load(path, **objects), RunFolder(Path(path))
    if folder.holds("summary.json"):
        return found
    found.require(OBJECTS)
    began = Run(folder).options
    for field, name in found.names.items():
        if name != getattr(began, field):
            raise UsageError(f"{field} '{name}' is not what this run began with, '{getattr(began, field)}'")
    folder.lock()
    carry_out(
        partial(runner.resume_run, force=force), found.options.model_copy(update={"out": folder.path}), folder, callback, progress
    )
    return found


@for_programs
def matrix(
    extract: Any = "all", aggregate: Any = "natural", *, seeds: int | Sequence[int] = 3,
    sweep: Mapping[str, Sequence[Any]] | None = None, controls: bool = True, metric: str = "global@test",
    model: Any = None, data: Any = None, profile: Any = None, wrap: Any = None,
    progress: bool | str = "auto", out: str | Path | None = None, **options: Any,
) -> Matrix:  # fmt: skip
    """Runs every pair of `extract` and `aggregate` at every point of `sweep` with every seed, one run after the other.

    `extract`: one or several of what `run` takes, or "all"; `aggregate` too, or "natural", each extraction's own partner. `seeds`:
    how many, or the seeds. `sweep`: values by option of a run or "plugin.option". `controls`: whether the controls run beside them.
    With `out`, runs of names that are in the folder already are not run again. A run that fails says so in its row.

    Examples:
        >>> import hetfl
        >>> small = dict(model="mlp", limit=200, clients=3, rounds=1, control=False)
        >>> found = hetfl.matrix(["heterofl", "fedrolex"], "overlap", seeds=1, controls=False, **small)
        >>> sorted(found.leaderboard["extract"])
        ['fedrolex', 'heterofl']
    """
    check_metric(metric)
    given = Given()
    values = gather(given, options, model=model, dataset=data, profile=profile, wrap=wrap)
    extracts, aggregates = ([given.names({role: one})[role] for one in list_values(several)]
                            for role, several in (("extract", extract), ("aggregate", aggregate)))  # fmt: skip
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    trials = sweeps.plan_trials(values, sweeps.cross_plugins(extracts, aggregates, controls), sweep or {}, numbers)
    for engine in {trial.options.engine for trial in trials}:
        given.refuse_elsewhere(engine)
    sweeps.refuse_bad(trials)
    results, path = list[TrialResult](), None if out is None else Path(out)
    with own_settings(), progress_line(progress, "matrix", len(trials)) as lines:
        for trial in trials:
            results.append(carry_out_trial(trial, path, reuse=not given.keys))
            for line in lines:
                line.step(len(results), f"{trial.extract} x {trial.aggregate}, seed {trial.seed}")
    if path is not None:
        leaderboard.write_tables([*results, *sweeps.read_others(path, trials)], metric, path)
    return Matrix(results, metric, path)


def gather(given: Given, options: Mapping[str, Any], **named: Any) -> dict[str, Any]:
    """The values of a run's options over those of its preset, each object by a name. Raises UsageError for what is no option."""
    for name in options:
        if name not in RunOptions.model_fields and "." not in name:
            raise UsageError(f"unknown option '{name}'{nearest(name, ['data', *named, *RunOptions.model_fields])}")
    if dotted := next((name for name in [*options, *(options.get("set") or {})] if "." in name), None):
        plugin, _, option = dotted.partition(".")
        raise UsageError(f'options of plugins are given as set={{"{plugin}": {{"{option}": …}}}}, not as "{dotted}"')
    if "dataset" in options and named["dataset"] is not None:
        raise UsageError("data and dataset are one option: give one of them")
    values = {name: value for name, value in [*named.items(), *options.items()] if value is not None}
    if isinstance(values.get("dataset"), Path):
        values["dataset"] = str(values["dataset"])
    values = given.names(values)
    return config.merge_options(presets.find_preset(values["preset"]).values if "preset" in values else {}, values)


def carry_out(
    job: Callable[..., dict[str, Any]], options: RunOptions, folder: RunFolder, callback: Any, progress: bool | str
) -> None:
    """Does `job`, a run or the rest of one, in `folder`, with those who look on."""
    title = f"{options.extract} x {options.aggregate or 'its partner'}"
    try:
        with own_settings(), progress_line(progress, title, options.rounds) as lines:
            watch = Observers([*([] if callback is None else list_values(callback)), *lines])
            watch.tell("on_run_start", {"options": options, "path": options.out})
            watch.tell("on_run_end", job(options, folder, watch))
    finally:
        folder.release()


def carry_out_trial(trial: Trial, out: Path | None, reuse: bool) -> TrialResult:
    """One run of a matrix, or what `out` has of it already."""
    folder: RunFolder = MemoryFolder() if out is None else RunFolder(out / "cells" / trial.name)
    found = sweeps.read_folder(folder, trial) if reuse else None
    if found is None or found.status == "failed":
        try:
            if out is not None:
                folder.open(overwrite=True).commit()
            sweeps.fill_folder(trial, folder, trial.options.workers)
        finally:
            folder.release()
        found = sweeps.read_folder(folder, trial)
        assert found is not None
    return found


def list_values(value: Any) -> list[Any]:
    """One or several as a list."""
    return list(value) if isinstance(value, list | tuple) else [value]
