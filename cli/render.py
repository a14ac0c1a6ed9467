"""What the terminal shows at the end: a run's summary, a leaderboard, a model's widths, lists of plugins and presets."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from rich.table import Table

from hetfl.cli.console import console, say
from hetfl.errors import plural
from hetfl.presets import Preset
from hetfl.registry import Entry

if TYPE_CHECKING:
    from hetfl.hooks.base import Plugin
    from hetfl.profiling.inspection import ModelReport, WidthReport
    from hetfl.runs.cell import TrialResult


def percent(share: float | None) -> str:
    """A share as a percentage; nothing for None."""
    return "" if share is None else f"{100 * share:.1f}%"


def format_bytes(count: float) -> str:
    """Bytes in the unit that suits them, decimal: 1.50 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False) -> Table:
    """A plain table; with `right`, numbers: all columns to the right."""
    made = Table(box=None, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold", justify="right" if right or column == "units" else "left")
    for row in rows:
        made.add_row(*row)
    return made


def print_summary(summary: dict[str, Any], path: Path) -> None:
    """What a run came to."""
    pair, size = f"{summary['extract']} x {summary['aggregate']} on {summary['dataset']}", plural(summary["clients"], "client")
    console.print()
    say(f"{pair}: {plural(summary['rounds'], 'round')}, {size}, {summary['seconds']:.1f} s", "bold")
    console.print(accuracy_table(summary["accuracy"]))
    if "pre-training" in summary:
        say(describe_pretraining(summary["pre-training"], summary["accuracy"].get("global@test")))
    console.print(level_table(summary["levels"]))
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in summary["seconds by phase"].items() if seconds >= 0.005)
    say(f"bytes: {format_bytes(summary['bytes down'])} down, {format_bytes(summary['bytes up'])} up")
    say(f"seconds: {phases}; clients' own time {summary['client seconds']:.2f}")
    for note in summary["notes"]:
        say(f"note: {note}", "yellow")
    say(f"run folder: {path}")


def describe_pretraining(before: dict[str, Any], after: dict[str, float] | None) -> str:
    """What the server's pre-training gave, and what the rounds added to it."""
    points = f"; the rounds {100 * (after['last'] - before['accuracy']):+.1f} points" if after else ""
    spent = f"{before['steps']} steps on the server's {before['examples']} examples"
    return f"before round 1: global@test {before['accuracy']:.1%} after {spent}{points}"


def accuracy_table(accuracies: dict[str, dict[str, float]]) -> Table:
    """Every accuracy of a run: last round, mean of the last three, worst decile of the clients, loss."""
    made = table(("accuracy", "last round", "mean of last 3", "worst decile", "loss"), [], right=True)
    made.columns[0].justify = "left"
    for name, values in accuracies.items():
        loss = f"{values['loss']:.3f}" if "loss" in values else ""
        made.add_row(name, percent(values["last"]), percent(values.get("last three")), percent(values.get("p10")), loss)
    return made


def level_table(levels: Sequence[dict[str, Any]]) -> Table:
    """What a client of each level spends in a round."""
    sizes = ("memory", "bytes down", "bytes up")
    rows = [
        (level["level"], f"{level['parameters']:,}", f"{level['MACs']:,}", *(format_bytes(level.get(n, 0)) for n in sizes),
         f"{level.get('seconds', 0):.2f}")
        for level in levels
    ]  # fmt: skip
    return table(("level", "parameters", "MACs", "training memory", "down", "up", "seconds"), rows, right=True)


def print_plugins(entries: Sequence[Entry]) -> None:
    """Every plugin by role."""
    columns = ("role", "name", "summary", "paper", "from")
    console.print(table(columns, [(e.role, e.name, e.summary, e.paper, e.source) for e in entries]))


def print_plugin(entry: Entry, plugin: type[Plugin]) -> None:
    """One plugin: what it is, its options and what its presets set."""
    say(f"{entry.role} {entry.name} ({entry.source}) {entry.paper}".rstrip(), "bold")
    console.print(cleandoc(plugin.__doc__ or entry.summary))
    facts = [f"works by {entry.granularity}"] if entry.granularity else []
    facts += [f"natural aggregation {entry.aggregate}"] if entry.aggregate else []
    facts += [text for flag, text in ((entry.public, "needs server data"), (entry.memory, "clients keep state")) if flag]
    if facts:
        say("; ".join(facts))
    presets: dict[str, dict[str, Any]] = getattr(plugin, "PRESETS", {})
    others = [name for name in presets if name != "default"]
    rows = [
        (f"{entry.name}.{name}", str(field.default), *(str(presets[key].get(name, "")) for key in others), field.description or "")
        for name, field in plugin.model_fields.items()
    ]
    console.print(table(("option", "default", *others, "meaning"), rows))
    if deviations := getattr(plugin, "DEVIATES", ()):
        say(f"where the default deviates (measured: docs/strategies/{entry.name}.md)", "bold")
        console.print(table(("piece", "default", "paper / reference code", "why"), deviations))


def print_presets(presets: Sequence[Preset]) -> None:
    """Every preset."""
    console.print(table(("preset", "what", "unlike the paper"), [(p.name, p.about, p.unlike) for p in presets]))


def print_preset(preset: Preset) -> None:
    """One preset's settings, as a run file, and their hash."""
    say(f"{preset.name}: {preset.about}", "bold")
    if preset.unlike:
        say(f"unlike the paper: {preset.unlike}")
    say(tomli_w.dumps(preset.values))
    say(f"sha256 {preset.digest}")


def print_model_report(report: ModelReport) -> None:
    """What `hfl inspect` found."""
    widths, inputs, groups = report.widths, report.inputs, plural(len(report.widths.groups), "width group")
    kind = f"{inputs.vocab} token ids" if inputs.vocab else "x".join(map(str, inputs.shape))
    say(
        f"{report.model} for {kind}, {inputs.classes} classes: {groups}, {widths.elastic():.1%} of its "
        f"entries can be cut (traced and proven in {report.seconds:.1f} s)", "bold",
    )  # fmt: skip
    cuts = [(g.name, str(g.size), list_some(report.members[g.name])) for g in widths.groups]
    console.print(table(("group", "units", "cuts"), cuts))
    console.print(table(("frozen", "why"), list(widths.frozen.items())))
    rows = [
        (f"{level.ratio:g}", f"{level.cost.parameters:,}", f"{level.cost.macs:,}", format_bytes(level.cost.memory),
         format_bytes(level.cost.bytes), f"{level.error:.1e}")
        for level in report.levels
    ]  # fmt: skip
    console.print(table(("level", "parameters", "MACs", "training memory", "payload", "sliced - masked"), rows, right=True))


def list_some(names: Sequence[str]) -> str:
    """The first four of `names`, and how many more there are."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def print_width_reports(model: str, reports: Sequence[WidthReport]) -> None:
    """What `hfl profile` measured, and the width that this machine affords."""
    rows = [
        (f"{r.ratio:g}", f"{r.cost.parameters:,}", f"{r.cost.macs:,}", format_bytes(r.cost.memory), f"{1000 * r.seconds:.2f} ms",
         r.exceeded or "yes")
        for r in reports
    ]  # fmt: skip
    console.print(table(("width", "parameters", "MACs", "training memory", "step", "affordable"), rows, right=True))
    best = max((r.ratio for r in reports if not r.exceeded), default=None)
    verdict = "affords no width of it" if best is None else f"affords width {best:g}"
    next_up = min((r for r in reports if r.exceeded and (best is None or r.ratio > best)), key=lambda r: r.ratio, default=None)
    why = f"; width {next_up.ratio:g} is too much: {next_up.exceeded}" if next_up else ""
    say(f"{model}: this machine {verdict}{why}", "bold")


def leaderboard_table(results: Sequence[TrialResult], metric: str) -> Table:
    """Mean and 95 % interval over the seeds at every point, by mean rank."""
    from hetfl.runs import leaderboard

    points = list(dict.fromkeys(r.trial.point for r in results))
    rows = []
    for row in leaderboard.rank_pairs(results, metric):
        values = [format_interval(*row.values[p]) if p in row.values else "" for p in points]
        rows.append((f"{row.rank:.1f}" if row.values else "", row.extract, row.aggregate, *values, row.why))
    return table(("rank", "extract", "aggregate", *(leaderboard.point_label(p) for p in points), ""), rows)


def format_interval(mean: float, half: float, seeds: int) -> str:
    """`71.3 ± 0.8`, in percent; the mean alone where there is one seed."""
    return f"{100 * mean:.1f}" + (f" ± {100 * half:.1f}" if seeds > 1 else "")


def print_leaderboard(results: Sequence[TrialResult], metric: str, out: Path) -> None:
    """What a sweep came to."""
    console.print()
    say(f"{metric}, %, mean over seeds and 95 % interval, by mean rank", "bold")
    console.print(leaderboard_table(results, metric))
    say(f"folder: {out} (matrix.csv, matrix.parquet, leaderboard.csv, heatmap.png, cells/)")


def print_written_leaderboard(rows: Sequence[dict[str, str]], path: Path) -> None:
    """A leaderboard as leaderboard.csv has it: a row a pair and point."""
    from hetfl.runs.leaderboard import HALF

    fixed = ("extract", "aggregate", "mean rank", "metric", "mean", HALF, "seeds", "why")
    points = [name for name in rows[0] if name not in fixed] if rows else []
    say(f"{rows[0]['metric']}, %, mean over seeds and 95 % interval, by mean rank" if rows else "no run has ended", "bold")
    shown = []
    for row in rows:
        rank, value = row["mean rank"], row.get("mean")
        found = format_interval(float(value), float(row[HALF] or "nan"), int(float(row["seeds"]))) if value else ""
        rank = f"{float(rank):.1f}" if value else ""
        shown.append((rank, row["extract"], row["aggregate"], *(row[p] or "" for p in points), found, row.get("why") or ""))
    console.print(table(("rank", "extract", "aggregate", *points, "accuracy", ""), shown))
    say(f"folder: {path} (matrix.csv, matrix.parquet, leaderboard.csv, heatmap.png, cells/)")


def print_scaling(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """What a round costs the server, by the number of clients."""
    from hetfl.runs import scaling

    phases = [name for name in scaling.SERVER_PHASES if max(r[f"{name} seconds"] for r in rows) >= 0.001]
    shown = [
        [f"{r['clients']:,}", f"{r['server seconds']:.3g}", f"{r['server ms a client']:.3g}",
         *(f"{r[f'{name} seconds']:.3f}" for name in phases),
         *(f"{r[name] / 1e6:,.3g}" for name in ("bytes down", "bytes up")), f"{r['peak memory'] / 1e6:,.0f}"]
        for r in rows
    ]  # fmt: skip
    columns = ("clients", "server s", "ms a client", *phases, "MB down", "MB up", "peak MB")
    console.print(table(columns, shown, right=True))
    if len(rows) > 1:
        power = scaling.growth_exponent(rows, "server seconds")
        say(f"server seconds grow as clients^{power:.2f} from {rows[0]['clients']:,} to {rows[-1]['clients']:,}")
    say(f"folder: {out} (scale.csv, scale.png, a run folder for each number of clients)")
