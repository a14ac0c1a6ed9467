"""The command line `hfl`: its commands, and how errors end. Heavy packages are imported inside the commands that need them."""

from __future__ import annotations

import re
import sys
import threading
import time
from typing import Annotated, NoReturn

import click
import typer

from hetfl.cli import check, compare, new_plugin, plan, reproduce, run, show, stopping, study
from hetfl.cli import report as reports
from hetfl.cli.console import complain
from hetfl.errors import RunError, UsageError

TWICE = re.compile(r"(Did you mean [^?]*\?) \(?Did you mean [^?]*\?\)?$")  # typer's guess, then click's own

INTERRUPTED = 130  # exit code after Ctrl-C

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

export = typer.Typer(help="Take an experiment elsewhere.", no_args_is_help=True)


def print_version(asked: bool) -> None:
    if asked:
        show.version()
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the versions that matter.")
    ] = False,
) -> None:
    """Federated learning with models of different sizes: any extraction pairs with any aggregation."""


COMMANDS = (
    run.run,
    run.resume,
    run.federate,
    study.matrix,
    study.scale,
    reproduce.reproduce,
    reports.report,
    compare.compare,
    check.check,
    show.inspect,
    show.profile,
    show.fleets,
    plan.plan,
)

for command in COMMANDS:
    app.command()(command)
app.command("new-plugin")(new_plugin.new_plugin)
app.command("list-plugins")(show.list_plugins)
app.command("plugins", help="Short for list-plugins.")(show.list_plugins)
app.command("presets")(show.list_presets)
app.command()(show.show)
app.command("check-run")(show.check_run)
app.command()(show.version)
app.add_typer(export, name="export")
export.command("flower")(run.export_flower)
export.command("peft")(run.export_peft)


def main(arguments: list[str] | None = None) -> None:
    """The entry point: one sentence and exit code 2 (usage) or 1 (a failed run) in place of a traceback."""
    words = sys.argv[1:] if arguments is None else arguments
    stopping.begin(listen=arguments is None)
    try:
        code = app(words, standalone_mode=False) or 0
    except BaseException as error:
        if stopping.was_stopped():  # whatever that became on the way out
            stopping.leave()
        if not isinstance(error, Exception):
            raise
        if "--debug" in words:
            raise
        code = report(error)
    if code == INTERRUPTED:  # a program that handles Ctrl-C by itself
        complain(stopping.farewell())
    if arguments is None:
        leave(code)
    sys.exit(code)


def leave(code: int) -> NoReturn:
    """Ends the process. Python's own way out would abort in torch where a client is still in training, or was until just now: one
    that is late, or one of a run that ended for another client's fault."""
    workers, until = [thread for thread in threading.enumerate() if thread.daemon and thread.name == "hetfl"], time.monotonic() + 1
    for worker in workers:
        worker.join(max(0.0, until - time.monotonic()))
    if code == 1 or any(worker.is_alive() for worker in workers):
        stopping.end_now(code)
    sys.exit(code)


def report(error: Exception) -> int:
    """Says what went wrong; returns the exit code."""
    if isinstance(error, click.ClickException):
        if sentence := error.format_message():  # none where help was shown, for no command was given
            complain(TWICE.sub(r"\1", sentence))
        return 2
    if isinstance(error, UsageError | RunError):
        complain(str(error))
        return 2 if isinstance(error, UsageError) else 1
    complain(f"the run failed: {type(error).__name__}: {error} (--debug shows where)")
    return 1


if __name__ == "__main__":
    main()
