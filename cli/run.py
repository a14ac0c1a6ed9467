"""`hfl run`, `hfl resume`, `hfl export` and `hfl federate`: one experiment, here or elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hetfl import config
from hetfl.cli import render
from hetfl.cli.console import say
from hetfl.cli.live import RoundDisplay
from hetfl.cli.options import ClientMod, Debug, check, gather, refuse_code, run_path, with_run_options
from hetfl.cli.stopping import resumable, tell_resume
from hetfl.config import RunOptions
from hetfl.errors import RunError, UsageError, foreign

if TYPE_CHECKING:
    from hetfl.runs.folder import RunFolder

Track = Annotated[list[str] | None, typer.Option(help="also tell a tracker: tensorboard, mlflow, wandb, trackio; may be repeated")]

FEDERATION = "federation.json"  # in a run folder: what hfl federate was asked for


@with_run_options
def run(
    file: Annotated[Path | None, typer.Argument(help="run file (TOML) with any of the options below")] = None,
    track: Track = None,
    allow: Annotated[str, typer.Option(help="modules from which the run file's model and plugins are loaded, with commas")] = "",
    debug: Debug = False,
    **given: Any,
) -> None:
    """Run one experiment and leave its results in a run folder."""
    options = config.resolve(gather(file, given))
    refuse_code(options, given, allow)
    check(options)
    from hetfl.runs.folder import RunFolder

    folder = RunFolder(run_path(options)).open(options.overwrite)
    try:
        folder.write("config.toml", config.format_run_file(options))
        summary = watch_run("run", options, folder, track or [])
        draw_pictures(folder)
    except (UsageError, ImportError):
        folder.discard()
        raise
    finally:
        folder.release()
    render.print_summary(summary, folder.path)


def watch_run(job: str, options: RunOptions, folder: RunFolder, track: list[str], *more: bool) -> dict[str, Any]:
    """Does `job` of the runner, given `more`, with its rounds on the screen, and tells the trackers; returns the summary."""
    with resumable(tell_resume(folder.path)), RoundDisplay(options, folder.path) as display:
        from hetfl.runs import runner
        from hetfl.runs.observers import Tee
        from hetfl.runs.trackers import tracking

        with tracking(track, options, folder.path) as watch:
            summary: dict[str, Any] = getattr(runner, job)(options, folder, Tee(display, watch), *more)
            watch.tell("on_run_end", summary)
    return summary


def draw_pictures(folder: RunFolder) -> None:
    """Draws the curves and the partition of a run that has ended."""
    from hetfl.cli import pictures

    pictures.draw_run(folder)


def resume(
    path: Annotated[Path, typer.Argument(help="folder of a run that was stopped")],
    track: Track = None,
    force: Annotated[bool, typer.Option(help="go on with options or versions that the run did not begin with")] = False,
    ray_address: Annotated[str | None, typer.Option(help="of another Ray cluster: auto or HOST:PORT")] = None,
    debug: Debug = False,
) -> None:
    """Go on with a run that was stopped or killed, from its last checkpoint; the result is that of a run never stopped."""
    from hetfl.runs.folder import RunFolder

    folder = RunFolder(path)
    folder.require_run()
    if (path / "summary.json").exists():
        say(f"this run has ended; nothing is left to do in {path}")
        with foreign(f"'{path / 'summary.json'}'"):
            render.print_summary(folder.read("summary.json"), path)
        return
    elsewhere = {} if ray_address is None else {"ray_address": ray_address}
    if (path / FEDERATION).exists():
        options = config.resolve({**config.read_run_file(path / "app" / "hetfl_app" / "run.toml"), **elsewhere, "out": path})
        config.refuse_for_ray(options)
        folder.lock()
        try:
            from hetfl.rounds.reporting import NoCallback
            from hetfl.runs import runner

            runner.refuse_changed(runner.load_snapshot(options, folder, NoCallback()), options, folder, force)
        finally:
            folder.release()
        run_federation(options, folder)
        return
    values = config.read_run_file(path / "config.toml")
    if not values:
        raise UsageError(f"the run in '{path}' was killed before its options were written; start it again with hfl run")
    options = config.resolve({**values, **elsewhere, "out": path})
    config.refuse_for_ray(options)
    folder.lock()
    try:
        summary = watch_run("resume_run", options, folder, track or [], force)
        draw_pictures(folder)
    finally:
        folder.release()
    render.print_summary(summary, path)


@with_run_options
def export_flower(
    folder: Annotated[Path, typer.Argument(help="folder for the app")],
    client_mod: ClientMod = None,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Write an experiment as a small Flower app, for flwr run on any SuperLink (docs/federation.md)."""
    options = gather_for_flower(given)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not options.overwrite)):
        raise UsageError(f"'{folder}' is not an empty folder; choose another or give --overwrite")
    from hetfl.engines.flower.export import export

    try:
        export(options, folder, client_mod or [])
    except OSError as error:
        raise UsageError(f"'{folder}' cannot be written: {error.strerror}") from error
    say(f"flwr run {folder} SUPERLINK --stream --run-config 'out=\"/path/of/the/run/folder\"'")


def export_peft(
    run: Annotated[Path, typer.Argument(help="folder of a run with --adapter lora")],
    folder: Annotated[Path, typer.Argument(help="folder for adapter_config.json and adapter_model.safetensors")],
    debug: Debug = False,
) -> None:
    """Write the adapters that a run trained in peft's format (docs/ranks.md)."""
    from hetfl.runs.api import load

    load(run).export_peft(folder)
    say(f"PeftModel.from_pretrained(model, '{folder}')")


def gather_for_flower(given: dict[str, Any]) -> RunOptions:
    """The options of a run that Flower carries out."""
    options = config.resolve({**gather(None, given), "engine": "flower"})
    check(options)
    return options


@with_run_options
def federate(
    nodes: Annotated[int, typer.Option(min=1, help="SuperNodes to start, a client each")] = 4,
    tls: Annotated[bool, typer.Option(help="certificates and node keys of our own; nobody else can join")] = False,
    allow: Annotated[str, typer.Option(help="plugins and models beside the built-in ones that nodes load, with commas")] = "",
    client_mod: ClientMod = None,
    clients: Annotated[int | None, typer.Option(hidden=True)] = None,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Run an experiment on a real Flower federation that is started on this machine and stopped again."""
    if clients not in (None, nodes):
        raise UsageError(f"every node is a client: --nodes {nodes} and --clients {clients} cannot both be")
    options = gather_for_flower({**given, "clients": nodes})
    from hetfl.engines.flower.export import export
    from hetfl.runs.folder import RunFolder

    folder = RunFolder(run_path(options)).open(options.overwrite)
    try:
        export(options, folder.path / "app", client_mod or [])
        folder.json(FEDERATION, {"nodes": nodes, "tls": tls, "allow": allow})
        folder.commit()
    except UsageError:
        folder.discard()
        raise
    finally:
        folder.release()
    run_federation(options, folder)


def run_federation(options: RunOptions, folder: RunFolder) -> None:
    """Runs, or goes on with, the app of a run folder on a federation of its own."""
    from hetfl.engines.flower.superlink import LocalFederation
    from hetfl.engines.select import KEYS

    asked = folder.read(FEDERATION)
    with (
        resumable(tell_resume(folder.path)),
        LocalFederation(folder.path / "flower", asked["nodes"], asked["tls"], asked["allow"]) as federation,
        RoundDisplay(options, folder.path) as display,
    ):
        folder.json(KEYS, federation.keys())
        summary = follow_events(federation.events(folder.path / "app", folder.path), display)
    draw_pictures(folder)
    render.print_summary(summary, folder.path)


def follow_events(events: Iterator[dict[str, Any]], display: RoundDisplay) -> dict[str, Any]:
    """Shows the events of a run elsewhere and returns its summary. Raises RunError where it failed."""
    for event in events:
        (kind, value), *_ = event.items()
        if kind == "ended":
            return dict(value)
        if kind == "failed":
            raise RunError(f"the run failed: {value}")
        if kind == "phase":
            display.phase(*value)
        elif kind == "done":
            display.done(value)
        elif kind == "fact":
            display.fact(value)
        elif kind == "note":
            display.note(value)
        else:
            display.alarm(value)
    raise RunError("the run ended without a result")
