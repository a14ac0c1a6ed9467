"""The command line: `hfl run`, `hfl list-plugins`, `hfl show`. Heavy packages are imported inside the commands that need them."""

from __future__ import annotations

import inspect as signatures
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from hetfl import config, presets, registry
from hetfl.cli import render
from hetfl.cli.render import Board, Live
from hetfl.config import RunOptions, format_flag
from hetfl.errors import RunError, UsageError, nearest, unknown
from hetfl.runs.folder import RunFolder

if TYPE_CHECKING:
    from hetfl.hooks.base import Plugin
    from hetfl.runs.cell import TrialResult

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FEDERATION = "federation.json"  # in a run folder: what hfl federate was asked for

LISTS = ("wrap", "lr_milestones", "mean", "std")  # options that may be given several times or with commas

# options that several commands have
Model = Annotated[str, typer.Argument(help="model of the zoo, package.module:factory, timm:name, transformers:type …")]

Dataset = Annotated[str | None, typer.Option(help="build the model for this data set")]

Shape = Annotated[str | None, typer.Option("--input", help="or for one example of this shape, e.g. 3x32x32")]

Classes = Annotated[int | None, typer.Option(min=2, help="number of classes [default: the data set's, or 10]")]

Vocab = Annotated[int | None, typer.Option(min=3, help="examples are token ids below this (with --input LENGTH)")]

ModelArgs = Annotated[list[str] | None, typer.Option(help="arguments of the model factory, name=value")]

Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]


@app.callback()
def top() -> None:
    """Federated learning with models of different sizes: any extraction pairs with any aggregation."""


def option(name: str, field: FieldInfo) -> signatures.Parameter:
    """The command-line option of one field of RunOptions; None means that it was not given."""
    kind = field.annotation
    listed = name in ("set", "model_args", *LISTS)
    plain: Any = list[str] if listed else bool if kind is bool else str
    shown = f"{field.description}{choices(kind)}"
    default = "" if field.default in (None, (), {}) else f" [default: {field.default}]"
    names = (f"{format_flag(name)}/--no-{name.replace('_', '-')}",) if kind is bool else (format_flag(name),)
    declared = typer.Option(None, *names, help=(shown + default).replace("[", "\\["), show_default=False)
    return signatures.Parameter(name, signatures.Parameter.KEYWORD_ONLY, default=declared, annotation=plain | None)


def choices(kind: Any) -> str:
    return f" ({', '.join(get_args(kind))})" if get_origin(kind) is Literal else ""


def options_of_a_run(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command` one option for each field of RunOptions."""
    own = [p for p in signatures.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    taken = {p.name for p in own}
    made = [option(name, field) for name, field in RunOptions.model_fields.items() if name not in taken]
    hints = {k: v for k, v in signatures.get_annotations(command, eval_str=True).items() if k != "given"}
    own = [p.replace(annotation=hints[p.name]) for p in own]
    command.__signature__ = signatures.Signature([*own, *made])  # type: ignore[attr-defined]
    command.__annotations__ = {**hints, **{p.name: p.annotation for p in made}}
    return command


@app.command()
@options_of_a_run
def run(
    file: Annotated[Path | None, typer.Argument(help="run file (TOML) with any of the options below")] = None,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Run one experiment and leave its results in a run folder."""
    options = config.resolve(gathered(file, given))
    check(options)
    folder = RunFolder(options.out or fresh(options)).open(options.overwrite)
    started = False
    try:
        folder.write("config.toml", config.format_run_file(options))
        with Live(options, folder.path) as watch:
            from hetfl.runs import runner

            started = True
            summary = runner.run(options, folder, watch)
        pictures(folder)
    except UsageError:
        folder.discard()
        raise
    except ImportError:
        if not started:
            folder.discard()
        raise
    finally:
        folder.release()
    render.summary(summary, folder.path)


@app.command()
def resume(
    path: Annotated[Path, typer.Argument(help="folder of a run that was stopped")],
    debug: Debug = False,
) -> None:
    """Go on with a run that was stopped or killed, from its last checkpoint; the result is that of a run never stopped."""
    folder = RunFolder(path)
    if not (path / "config.toml").exists():
        raise UsageError(f"'{path}' is no run folder of hetfl: it holds no config.toml")
    if (path / "summary.json").exists():
        render.console.print(f"this run has ended; nothing is left to do in {path}", soft_wrap=True)
        render.summary(folder.read("summary.json"), path)
        return
    values = config.read_run_file(path / "config.toml")
    if (path / FEDERATION).exists():
        carried_out(config.resolve({**config.read_run_file(path / "app" / "hetfl_app" / "run.toml"), "out": path}), folder)
        return
    if not values:
        raise UsageError(f"the run in '{path}' was killed before its options were written; start it again with hfl run")
    options = config.resolve({**values, "out": path})
    folder.lock()
    try:
        with Live(options, path) as watch:
            from hetfl.runs import runner

            summary = runner.resume_run(options, folder, watch)
        pictures(folder)
    finally:
        folder.release()
    render.summary(summary, path)


export = typer.Typer(help="Take an experiment elsewhere.", no_args_is_help=True)

app.add_typer(export, name="export")


@export.command("flower")
@options_of_a_run
def export_flower(
    folder: Annotated[Path, typer.Argument(help="folder for the app")],
    client_mod: Annotated[list[str] | None, typer.Option(help="a client mod of Flower's, name:number:…; may be repeated")] = None,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Write an experiment as a small Flower app, for flwr run on any SuperLink (docs/federation.md)."""
    options = elsewhere(given)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not options.overwrite)):
        raise UsageError(f"'{folder}' is not an empty folder; choose another or give --overwrite")
    from hetfl.engines.flower.export import export as exported

    try:
        exported(options, folder, client_mod or [])
    except OSError as error:
        raise UsageError(f"'{folder}' cannot be written: {error.strerror}") from error
    render.console.print(f"flwr run {folder} SUPERLINK --stream --run-config 'out=\"/path/of/the/run/folder\"'", soft_wrap=True)


def elsewhere(given: dict[str, Any]) -> RunOptions:
    """The options of a run that Flower carries out."""
    options = config.resolve({**gathered(None, given), "engine": "flower"})
    check(options)
    return options


@app.command()
@options_of_a_run
def federate(
    nodes: Annotated[int, typer.Option(min=1, help="SuperNodes to start, a client each")] = 4,
    tls: Annotated[bool, typer.Option(help="certificates and node keys of our own; nobody else can join")] = False,
    allow: Annotated[str, typer.Option(help="plugins and models beside the built-in ones that nodes load, with commas")] = "",
    client_mod: Annotated[list[str] | None, typer.Option(help="a client mod of Flower's, name:number:…; may be repeated")] = None,
    clients: Annotated[int | None, typer.Option(hidden=True)] = None,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Run an experiment on a real Flower federation that is started on this machine and stopped again."""
    if clients not in (None, nodes):
        raise UsageError(f"every node is a client: --nodes {nodes} and --clients {clients} cannot both be")
    options = elsewhere({**given, "clients": nodes})
    folder = RunFolder(options.out or fresh(options)).open(options.overwrite)
    folder.release()
    from hetfl.engines.flower.export import export as exported

    try:
        exported(options, folder.path / "app", client_mod or [])
    except UsageError:
        folder.discard()
        raise
    folder.json(FEDERATION, {"nodes": nodes, "tls": tls, "allow": allow})
    carried_out(options, folder)


def carried_out(options: RunOptions, folder: RunFolder) -> None:
    """Runs, or goes on with, the app of a run folder on a federation of its own."""
    from hetfl.engines.flower.superlink import LocalFederation

    asked = folder.read(FEDERATION)
    with (
        LocalFederation(folder.path / "flower", asked["nodes"], asked["tls"], asked["allow"]) as federation,
        Live(options, folder.path) as watch,
    ):
        summary = followed(federation.events(folder.path / "app", folder.path), watch)
    pictures(folder)
    render.summary(summary, folder.path)


def followed(events: Iterator[dict[str, Any]], watch: Live) -> dict[str, Any]:
    """Shows what a run elsewhere tells of itself; its summary. Raises RunError where it failed."""
    for event in events:
        (kind, value), *_ = event.items()
        if kind == "ended":
            return dict(value)
        if kind == "failed":
            raise RunError(f"the run failed: {value}")
        if kind == "phase":
            watch.phase(*value)
        elif kind == "done":
            watch.done(value)
        else:
            getattr(watch, kind)(value)
    raise RunError("the run ended without a result")


def gathered(file: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """The values of a run: the command line's over the run file's over the preset's."""
    values = merge(config.read_run_file(file) if file else {}, {k: v for k, v in given.items() if v not in (None, [])})
    below = presets.find_preset(str(values["preset"])).values if values.get("preset") is not None else {}
    return config.merge_options(below, values)


def check(options: RunOptions) -> None:
    """Refuses what can be refused before torch is imported."""
    extract = registry.find("extract", options.extract)
    named = [extract, registry.find("aggregate", options.aggregate or extract.aggregate or "overlap")]
    named += [registry.find("profile", options.profile), *(registry.find("wrap", w) for w in options.wrap)]
    needy = next((e for e in named if e.public), None)
    if needy and not options.server_data:
        raise UsageError(f"{needy.role} plugin '{needy.name}' needs public data on the server: --server-data must be above 0")
    if options.levels is not None and options.profile != "levels":
        raise UsageError(f"--levels sets options of the profile plugin 'levels', but --profile is '{options.profile}'")


def fresh(options: RunOptions) -> Path:
    """A new folder under runs/, named after the time and the strategy."""
    partner = options.aggregate or registry.find("extract", options.extract).aggregate
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{options.extract}-{partner}"
    paths = [Path("runs") / name, *(Path("runs") / f"{name}-{i}" for i in range(2, 100))]
    return next(p for p in paths if not p.exists())


def merge(file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The run file's values with those of the command line over them."""
    for name in ("set", "model_args"):
        pairs = given.pop(name, [])
        if pairs:
            file[name] = over(file.get(name, {}), [assignment(pair, format_flag(name)) for pair in pairs])
    for name in LISTS:
        if name in given:
            given[name] = [part for item in given[name] for part in item.split(",")]
    return {**file, **given}


def over(tree: Any, pairs: list[tuple[list[str], Any]]) -> dict[str, Any]:
    whole = json.loads(json.dumps(tree)) if isinstance(tree, dict) else {}
    for path, value in pairs:
        place = whole
        for part in path[:-1]:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise UsageError(f"'{'.'.join(path)}' is given twice, as a value and as a table")
        place[path[-1]] = value
    return whole


def assignment(text: str, name: str) -> tuple[list[str], Any]:
    """`a.b=value` as (path, value); numbers, true, false and JSON lists are read as such."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"{name} takes name=value, not '{text}'")
    try:
        return key.split("."), json.loads(value)
    except ValueError:
        return key.split("."), value


def pictures(folder: RunFolder) -> None:
    """Draws the curves and the partition; a run is complete without them."""
    from hetfl.cli import pictures

    pictures.draw(folder)


@app.command()
def inspect(
    model: Model,
    levels: Annotated[str, typer.Option(help="width ratios to measure, in (0, 1]")] = "1,0.5,0.25",
    dataset: Dataset = None,
    shape: Shape = None,
    classes: Classes = None,
    vocab: Vocab = None,
    model_args: ModelArgs = None,
    batch_size: Annotated[int, typer.Option(min=1, help="batch size of the training memory")] = 32,
    heads: Annotated[str, typer.Option(help="what is cut of attention: width, or whole heads")] = "width",
    norm_policy: Annotated[str, typer.Option(help="as in hfl run")] = "auto",
    debug: Debug = False,
) -> None:
    """Show a model's width groups, what is frozen and why, and what each level costs, measured on the sliced module."""
    checked = config.resolve({"heads": heads, "norm_policy": norm_policy})
    ratios = numbers(levels)
    from hetfl.profiling import inspection

    inputs = inspection.choose_inputs(model, dataset, shape, classes, vocab)
    args = arguments(model_args)
    render.survey(
        inspection.inspect_model(
            model, args, inputs, ratios, batch=batch_size, heads=checked.heads, norm_policy=checked.norm_policy
        )
    )


@app.command()
def profile(
    model: Model,
    levels: Annotated[str, typer.Option(help="width ratios to choose from, in (0, 1]")] = "1,0.75,0.5,0.25,0.125,0.0625",
    dataset: Dataset = None,
    shape: Shape = None,
    classes: Classes = None,
    vocab: Vocab = None,
    model_args: ModelArgs = None,
    batch_size: Annotated[int, typer.Option(min=1, help="local batch size")] = 32,
    steps: Annotated[int, typer.Option(min=1, help="training steps of a round")] = 100,
    deadline: Annotated[float, typer.Option(min=0, help="seconds for a round's training")] = 60.0,
    share: Annotated[float, typer.Option(min=0, max=1, help="share of the free memory that training may use")] = 0.5,
    debug: Debug = False,
) -> None:
    """Show what this machine can afford of a model, measured here and now, and what keeps it from more."""
    ratios = numbers(levels)
    from hetfl.profiling import inspection

    inputs = inspection.choose_inputs(model, dataset, shape, classes, vocab)
    args = arguments(model_args)
    render.offers(
        model, inspection.measure_widths(model, args, inputs, ratios, batch=batch_size, steps=steps, deadline=deadline, share=share)
    )


def arguments(pairs: list[str] | None) -> dict[str, Any]:
    """The factory's arguments of --model-args."""
    return over({}, [assignment(pair, "--model-args") for pair in pairs or []])


def numbers(levels: str) -> list[float]:
    """The width ratios of --levels."""
    try:
        ratios = [float(part) for part in levels.split(",")]
    except ValueError:
        ratios = []
    if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
        raise UsageError(f"--levels takes width ratios in (0, 1] such as 1,0.5,0.25, not '{levels}'")
    return ratios


@app.command()
@options_of_a_run
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
    metric: Annotated[str, typer.Option(help="what the leaderboard ranks, e.g. global@test or personal@own")] = "global@test",
    out: Annotated[Path, typer.Option(help="folder; a matrix that was stopped goes on there")] = Path("matrix"),
    seed: Annotated[int | None, typer.Option(hidden=True)] = None,
    overwrite: Annotated[bool, typer.Option(hidden=True)] = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Run many pairs over many settings and seeds, the controls always among them; what is in --out already is not run again."""
    from hetfl.runs import leaderboard
    from hetfl.runs import sweep as cross

    swept = {} if alpha is None else {"alpha": [assignment(f"x={value}", "--alpha")[1] for value in alpha.split(",")]}
    for text in sweep or []:
        path, values = assignment(text, "--sweep")
        name, listed = ".".join(path), values if isinstance(values, list) else str(values).split(",")
        swept[name] = [assignment(f"x={value}", "--sweep")[1] if isinstance(value, str) else value for value in listed]
    found = cross.cells(gathered(None, given), cross.pairs(extract.split(","), aggregate.split(",")), swept, whole(seeds))
    try:
        (out / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out '{out}' cannot be written: {error.strerror}") from error
    cross.refuse_bad(found)
    outcomes: list[TrialResult] = []
    try:
        with Board(len(found), metric) as board:
            for outcome in cross.run(found, out, jobs):
                outcomes.append(outcome)
                board.show(outcomes)
    finally:
        leaderboard.write(outcomes, metric, out)
    finish(outcomes, metric, out)


def finish(outcomes: list[TrialResult], metric: str, out: Path) -> None:
    """Shows what a matrix came to. Raises RunError where cells failed."""
    from hetfl.cli import pictures

    pictures.heatmap(outcomes, out, metric)
    render.leaderboard(outcomes, metric, out)
    names = {name for o in outcomes for name in o.row if "@" in name}
    if metric not in names:
        raise UsageError(f"--metric '{metric}' is not among what was measured{nearest(metric, names)} ({', '.join(sorted(names))})")
    if failed := [o for o in outcomes if o.status == "failed"]:
        raise RunError(f"{len(failed)} of {len(outcomes)} cells failed, the first: {failed[0].cell.name}: {failed[0].row['why']}")


@app.command()
@options_of_a_run
def scale(
    clients: Annotated[str, typer.Option(help="numbers of clients with commas")] = "10,100,1000",
    out: Annotated[Path, typer.Option(help="folder for scale.csv, scale.png and the runs")] = Path("scale"),
    overwrite: Annotated[bool, typer.Option(hidden=True)] = False,
    debug: Debug = False,
    **given: Any,
) -> None:
    """Measure what a round costs the server by the number of clients: seconds, memory, bytes; and draw the curve."""
    from hetfl.runs import scaling

    counts = sorted({int(part) for part in clients.split(",") if part.strip().isdigit()})
    if not counts or len(counts) != len(clients.split(",")) or counts[0] < 1:
        raise UsageError(f"--clients takes different numbers of clients such as 10,100,1000, not '{clients}'")
    options = config.resolve({**scaling.START, **gathered(None, given)})
    if options.rounds < 2:
        raise UsageError("--rounds must be 2 or more here: the first round warms up and is not counted")
    check(options)
    folder, rows = RunFolder(out), list[dict[str, Any]]()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out '{out}' cannot be written: {error.strerror}") from error
    for row in scaling.measured(options, counts, out):
        rows.append(row)
        render.scaled(row)
        folder.table("scale.csv", rows)
    from hetfl.cli import pictures

    pictures.growth(rows, folder)
    render.growth(rows, out)


def whole(seeds: str) -> list[int]:
    """`3` is 0, 1, 2; a list with commas is itself."""
    try:
        numbers = [int(part) for part in seeds.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or ("," not in seeds and numbers[0] < 1):
        raise UsageError(f"--seeds takes how many, such as 3, or seeds such as 0,1,2, not '{seeds}'")
    return numbers if "," in seeds else list(range(numbers[0]))


@app.command("presets")
def list_presets(
    name: Annotated[str | None, typer.Argument(help="show this preset's settings")] = None,
    debug: Debug = False,
) -> None:
    """List the papers' experiments that `hfl run --preset` takes, or show one."""
    if name is None:
        render.presets(list(presets.presets().values()))
    else:
        render.preset(presets.find_preset(name))


@app.command("list-plugins")
def list_plugins() -> None:
    """List every plugin by role; none is imported for it."""
    render.plugins(registry.entries())


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="a plugin's name, role.name, or a run folder")],
    debug: Debug = False,
) -> None:
    """Show a plugin's options and docs, or a run's summary again."""
    if Path(name).is_dir():
        render.summary(RunFolder(Path(name)).read("summary.json"), Path(name))
        return
    role, _, plain = name.rpartition(".")
    found = [e for e in registry.entries() if e.name == plain and role in ("", e.role)]
    if not found:
        names = {e.name for e in registry.entries()}
        raise unknown("plugin or run folder", name, names)
    for entry in found:
        strategy: type[Plugin] = registry.find(entry.role, entry.name).load()
        render.plugin(entry, strategy)


@app.command()
def version() -> None:
    """Print the versions that matter."""
    from importlib.metadata import version as of

    render.console.print(*(f"{name} {of(name)}" for name in ("hetfl", "torch", "flwr", "datasets")))


def main(arguments: list[str] | None = None) -> None:
    """The entry point: one sentence and exit code 2 (usage) or 1 (a failed run) in place of a traceback."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(words, standalone_mode=False)
    except Exception as error:
        if "--debug" in words:
            raise
        code = report(error)
    except KeyboardInterrupt:
        render.complain("stopped; the rounds that had ended are in the run folder, and hfl resume goes on from there")
        code = 130
    sys.exit(code or 0)


def report(error: Exception) -> int:
    """Says what went wrong; returns the exit code."""
    import click

    if isinstance(error, click.ClickException):
        render.complain(error.format_message())
        return 2
    if isinstance(error, UsageError):
        render.complain(str(error))
        return 2
    if isinstance(error, RunError):
        render.complain(str(error))
        return 1
    render.complain(f"the run failed: {type(error).__name__}: {error} (--debug shows where)")
    return 1


if __name__ == "__main__":
    main()
