"""`hfl matrix` and `hfl scale`: many runs as one experiment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hetfl import config
from hetfl.cli import render
from hetfl.cli.console import say
from hetfl.cli.live import Describe, SweepDisplay, describe_trial
from hetfl.cli.options import Debug, check, gather, parse_pair, parse_value, with_run_options
from hetfl.cli.stopping import resumable
from hetfl.errors import RunError, UsageError, nearest

GOES_ON = "stopped; the same command goes on: what has ended is kept, and long runs go on from their last checkpoint"

if TYPE_CHECKING:
    from hetfl.runs.cell import Trial, TrialResult
    from hetfl.runs.sweep import Elsewhere


@with_run_options
def matrix(
    extract: Annotated[str, typer.Option(help="extractions with commas, or all")] = "all",
    aggregate: Annotated[
        str, typer.Option(help="aggregations with commas, all, or natural: each extraction's own partner")
    ] = "natural",
    alpha: Annotated[str | None, typer.Option(help="Dirichlet concentrations with commas")] = None,
    seeds: Annotated[str, typer.Option(help="how many seeds, or the seeds with commas (0, for seed 0 alone)")] = "3",
    sweep: Annotated[
        list[str] | None, typer.Option(help="option=value,value: any run option or plugin.option; may be repeated")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at once, each a process with its share of the cores")] = 1,
    on: Annotated[
        Literal["here", "ray"],
        typer.Option(help="run on this machine, or as tasks on a Ray cluster (--ray-address; docs/cluster.md)"),
    ] = "here",
    metric: Annotated[str, typer.Option(help="what the leaderboard ranks, e.g. global@test or personal@own")] = "global@test",
    out: Annotated[Path, typer.Option(help="folder; a matrix that was stopped goes on there")] = Path("matrix"),
    seed: Annotated[int | None, typer.Option(hidden=True)] = None,
    overwrite: Annotated[bool, typer.Option(hidden=True)] = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Run many pairs over many settings and seeds, the controls always among them; what is in --out already is not run again."""
    from hetfl.runs import leaderboard
    from hetfl.runs import sweep as sweeps
    from hetfl.runs.cell import check_metric

    check_metric(metric)
    elsewhere = find_cluster() if on == "ray" else None
    swept = {} if alpha is None else {"alpha": [parse_value(value) for value in alpha.split(",")]}
    swept |= parse_sweep(sweep or [])
    pairs = sweeps.cross_plugins(extract.split(","), aggregate.split(","))
    trials = sweeps.plan_trials(gather(None, given), pairs, swept, parse_seeds(seeds))
    if elsewhere is None and all(trial.options.engine != "ray" for trial in trials):
        config.refuse_for_ray(trials[0].options, "--engine ray or --on ray")
    make_folder(out / "cells", out)
    sweeps.refuse_bad(trials)
    results: list[TrialResult] = []
    try:
        show_trials(sweeps.run_trials(trials, out, jobs, elsewhere), trials, metric, results, out)
    finally:
        results = leaderboard.sort_results(results, trials)
        leaderboard.write_tables([*results, *sweeps.read_others(out, trials)], metric, out)
    conclude(results, metric, out)


def find_cluster() -> Elsewhere:
    """What runs trials on a Ray cluster. Raises UsageError where Ray is not installed."""
    try:
        from hetfl.runs.cluster import run_on_ray
    except ModuleNotFoundError as error:
        raise UsageError("--on ray needs Ray: pip install 'hetfl[ray]'") from error
    return run_on_ray


def show_trials(
    running: Iterable[TrialResult], trials: Sequence[Trial], value: str | Describe, results: list[TrialResult], out: Path
) -> None:
    """Shows the `trials` as they end, and adds them to `results`; whoever stops this is told how it goes on.

    `value`: the metric by which they are shown, or what says a line's value.
    """
    with resumable(lambda: GOES_ON), SweepDisplay(trials, value, out) as display:
        for result in running:
            results.append(result)
            display.show(results)


def refuse_failed(results: Sequence[TrialResult]) -> None:
    """Raises RunError where trials failed."""
    if failed := [result for result in results if result.status == "failed"]:
        first = f"{describe_trial(failed[0].trial)}: {failed[0].row['why']}"
        raise RunError(f"{len(failed)} of {len(results)} trials failed, the first: {first}")


def parse_sweep(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`lr=0.1,0.01` as {lr: [0.1, 0.01]}; a JSON list is taken as it is."""
    swept = {}
    for text in texts:
        path, values = parse_pair(text, "--sweep")
        listed = values if isinstance(values, list) else str(values).split(",")
        swept[".".join(path)] = [parse_value(value) if isinstance(value, str) else value for value in listed]
    return swept


def parse_seeds(text: str) -> list[int]:
    """`3` is 0, 1, 2; a list with commas is itself."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or ("," not in text and numbers[0] < 1):
        raise UsageError(f"--seeds takes how many, such as 3, or seeds such as 0,1,2, not '{text}'")
    return numbers if "," in text else list(range(numbers[0]))


def make_folder(path: Path, out: Path) -> None:
    """Makes a folder within --out. Raises UsageError where it cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out '{out}' cannot be written: {error.strerror}") from error


def conclude(results: list[TrialResult], metric: str, out: Path) -> None:
    """Shows what a sweep came to. Raises RunError where trials failed."""
    from hetfl.cli import pictures

    pictures.draw_matrix(results, out, metric)
    render.print_leaderboard(results, metric, out)
    refuse_failed(results)
    names = {name for result in results for name in result.row if "@" in name}
    if metric not in names:
        raise UsageError(f"--metric '{metric}' is not among what was measured{nearest(metric, names)} ({', '.join(sorted(names))})")


@with_run_options
def scale(
    clients: Annotated[str, typer.Option(help="numbers of clients with commas")] = "10,100,1000",
    out: Annotated[Path, typer.Option(help="folder for scale.csv, scale.png and the runs")] = Path("scale"),
    overwrite: Annotated[bool, typer.Option(hidden=True)] = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Measure what a round costs the server by the number of clients: seconds, memory, bytes; and draw the curve."""
    from hetfl.cli import pictures
    from hetfl.runs import scaling
    from hetfl.runs.folder import RunFolder

    counts = sorted({int(part) for part in clients.split(",") if part.strip().isdigit()})
    if not counts or len(counts) != len(clients.split(",")) or counts[0] < 1:
        raise UsageError(f"--clients takes different numbers of clients such as 10,100,1000, not '{clients}'")
    options = config.resolve({**scaling.DEFAULTS, **gather(None, given)})
    if options.rounds < 2:
        raise UsageError("--rounds must be 2 or more here: the first round warms up and is not counted")
    check(options)
    make_folder(out, out)
    folder, rows = RunFolder(out), list[dict[str, Any]]()
    for row in scaling.measure_sizes(options, counts, out):
        rows.append(row)
        say(f"{row['clients']:,} clients: {row['server seconds']:.3g} s of server time a round")
        folder.table("scale.csv", rows)
    pictures.draw_scaling(rows, folder)
    render.print_scaling(rows, out)
