"""`hfl inspect`, `profile`, `list-plugins`, `presets`, `show`, `version`: what there is, and what it costs."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hetfl import config, presets, registry
from hetfl.cli import render
from hetfl.cli.console import say
from hetfl.cli.options import Debug, ModelArgs, parse_pairs
from hetfl.errors import RunError, UsageError, foreign, unknown
from hetfl.registry import Entry

Model = Annotated[str, typer.Argument(help="model of the zoo, package.module:factory, timm:name, transformers:type …")]

Dataset = Annotated[str | None, typer.Option(help="build the model for this data set")]

Shape = Annotated[str | None, typer.Option("--input", help="or for one example of this shape, e.g. 3x32x32")]

Classes = Annotated[int | None, typer.Option(min=2, help="number of classes (default: the data set's, or 10)")]

Vocab = Annotated[int | None, typer.Option(min=3, help="examples are token ids below this (with --input LENGTH)")]


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
    adapter: Annotated[str | None, typer.Option(help="as in hfl run, with --axis")] = None,
    axis: Annotated[str, typer.Option(help="what each level of these costs, side by side: width, rank, depth, blocks")] = "",
    debug: Debug = False,
) -> None:
    """Show a model's width groups and residual blocks, what is frozen and why, and what each level costs, measured when sliced."""
    checked = config.resolve({"heads": heads, "norm_policy": norm_policy})
    ratios = parse_ratios(levels)
    from hetfl.profiling import inspection

    inputs = inspection.choose_inputs(model, dataset, shape, classes, vocab)
    args = parse_pairs(model_args or [], "--model-args")
    how: dict[str, Any] = {"batch": batch_size, "heads": checked.heads, "norm_policy": checked.norm_policy}
    if axis:
        axes = [name.strip() for name in axis.split(",")]
        whole = sorted({1.0, *ratios}, reverse=True)
        render.print_axes(inspection.measure_axes(model, args, inputs, axes, whole, adapter, **how))
        return
    if adapter:
        raise UsageError("--adapter goes with --axis width,rank")
    report = inspection.inspect_model(model, args, inputs, ratios, **how)
    render.print_model_report(report)


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
    export: Annotated[Path | None, typer.Option(help="write what was measured as a fleet of this device, for --fleet FILE")] = None,
    watts: Annotated[float, typer.Option(min=0.001, help="what this device draws while it works, for --export")] = 10.0,
    debug: Debug = False,
) -> None:
    """Show what this machine can afford of a model, measured here and now, and what keeps it from more."""
    ratios = parse_ratios(levels)
    from hetfl.profiling import inspection
    from hetfl.training.local import make_step

    inputs = inspection.choose_inputs(model, dataset, shape, classes, vocab)
    args = parse_pairs(model_args or [], "--model-args")
    reports = inspection.measure_widths(
        model, args, inputs, ratios, batch=batch_size, steps=steps, deadline=deadline, share=share,
        make_step=partial(make_step, options=config.resolve({"batch_size": batch_size}), kind=inputs.kind),
    )  # fmt: skip
    render.print_width_reports(model, reports)
    if export is not None:
        say(f"fleet file: {export}; {inspection.export_fleet(export, model, reports, share, watts)}")


def parse_ratios(levels: str) -> list[float]:
    """The width ratios of --levels."""
    try:
        ratios = [float(part) for part in levels.split(",")]
    except ValueError:
        ratios = []
    if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
        raise UsageError(f"--levels takes width ratios in (0, 1] such as 1,0.5,0.25, not '{levels}'")
    return ratios


def fleets(
    name: Annotated[str | None, typer.Argument(help="show this fleet, mix or file with its classes")] = None,
    traces: Annotated[
        list[Path] | None,
        typer.Option("--import", help="fit a fleet to a trace: FedScale's pickle or a CSV file; as often as wanted"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="with --import: the fleet file to write, for --fleet FILE (default: imported.toml)")
    ] = None,
    debug: Debug = False,
) -> None:
    """List the fleets of devices that --fleet takes, show one and where its figures come from, or make one from traces."""
    from hetfl.profiling.fleets import find_fleet, list_fleets

    if traces and name is not None:
        raise UsageError(f"fleets shows '{name}' or makes a fleet with --import, not both")
    if out is not None and not traces:
        raise UsageError("--out is for --import: nothing else writes a fleet file here")
    if traces:
        import_traces(traces, out or Path("imported.toml"))
    elif name is None:
        render.print_fleets(list_fleets())
    else:
        render.print_fleet(find_fleet(name))


def import_traces(traces: list[Path], out: Path) -> None:
    """Writes the fleet file `out` from traces, and shows the fleet."""
    from hetfl.files import reason
    from hetfl.profiling.fleets import find_fleet
    from hetfl.profiling.traces import format_traces, read_traces

    if out.suffix != ".toml" or not out.stem.replace("-", "").replace("_", "").isalnum():
        raise UsageError(f"--out takes a file NAME.toml of letters, digits, - and _, not '{out}'")
    if out.exists():
        raise UsageError(f"'{out}' is there already; choose another file with --out")
    text = format_traces(out.stem, read_traces(traces))
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"'{out}' cannot be written: {reason(error)}") from error
    render.print_fleet(find_fleet(str(out)))
    say(f"fleet file: {out}")


def list_plugins() -> None:
    """List every plugin by role; none is imported for it."""
    render.print_plugins(registry.entries())


def list_presets(
    name: Annotated[str | None, typer.Argument(help="show this preset's settings")] = None,
    debug: Debug = False,
) -> None:
    """List the papers' experiments that `hfl run --preset` takes, or show one."""
    if name is None:
        render.print_presets(list(presets.presets().values()))
    else:
        render.print_preset(presets.find_preset(name))


def show(
    name: Annotated[str, typer.Argument(help="a plugin's name, role.name or package.module:Class, or a folder of a run or matrix")],
    debug: Debug = False,
) -> None:
    """Show a plugin's options and docs, or a run's summary or a matrix's leaderboard again."""
    if Path(name).is_dir():
        show_folder(Path(name))
        return
    from hetfl.hooks.loading import load_class

    for entry in find_in_any_role(name):
        render.print_plugin(entry, load_class(entry))


def show_folder(path: Path) -> None:
    """Shows what a run or a matrix came to. Raises UsageError where the folder has no such thing."""
    from hetfl.runs.folder import RunFolder

    folder = RunFolder(path)
    if folder.holds("summary.json"):
        with foreign(f"'{path / 'summary.json'}'"):
            render.print_summary(folder.read("summary.json"), path)
        if fault := folder.weights_fault():
            raise RunError(f"{fault}: it was changed or damaged since")
    elif folder.holds("leaderboard.csv"):
        render.print_written_leaderboard(folder.rows("leaderboard.csv"), path)
    elif folder.holds("config.toml"):
        raise UsageError(f"the run in '{path}' has not ended: hfl resume goes on with it")
    else:
        raise UsageError(f"'{path}' is no folder of a run or matrix: it holds neither summary.json nor leaderboard.csv")


def check_run(
    path: Annotated[Path, typer.Argument(help="a run folder")],
    debug: Debug = False,
) -> None:
    """Verify the files of a run folder: checkpoints, tables, weights; exit code 1 where one is damaged."""
    from hetfl.runs.check import check_folder

    found = list(check_folder(path))
    for name, fault in found:
        say(f"{name}: {fault or 'ok'}", style="red" if fault else "")
    if damaged := [name for name, fault in found if fault]:
        raise RunError(f"{len(damaged)} of {len(found)} things in '{path}' are damaged: {', '.join(damaged)}")


def find_in_any_role(name: str) -> list[Entry]:
    """The plugins of that name, or `role.name`; a class by `package.module:Class` in the role whose hook it implements."""
    if ":" in name:
        from hetfl.hooks.loading import load_class, roles_of

        return [registry.find((roles_of(load_class(registry.find("wrap", name))) or ["wrap"])[0], name)]
    role, _, plain = name.rpartition(".")
    found = [registry.find(e.role, plain) for e in registry.entries() if e.name == plain and role in ("", e.role)]
    if not found:
        raise unknown("plugin or run folder", name, {e.name for e in registry.entries()})
    return found


def version(debug: Debug = False) -> None:
    """Print the versions that matter, with the commit where hetfl is a checkout."""
    from importlib.metadata import version as version_of

    import hetfl

    commit = find_commit(Path(hetfl.__file__).resolve().parent.parent)
    own = f"hetfl {hetfl.__version__}{f' ({commit})' if commit else ''} (contract {hetfl.API})"
    say(" ".join([own, *(f"{name} {version_of(name)}" for name in ("torch", "flwr", "datasets"))]))


def find_commit(checkout: Path) -> str:
    """The commit of hetfl's own checkout, with + where files are changed; "" where it is none, or git is not there."""
    if not (checkout / ".git").exists():
        return ""
    words = ["git", "-C", str(checkout), "describe", "--always", "--exclude=*", "--abbrev=10", "--dirty=+"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
