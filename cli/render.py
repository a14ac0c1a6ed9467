"""What the terminal shows at the end: a run's summary, a leaderboard, a model's widths, lists of plugins and presets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from hetfl.cli.console import clean, console, say
from hetfl.errors import plural
from hetfl.presets import Preset
from hetfl.registry import BUILT_IN, Entry

if TYPE_CHECKING:
    from hetfl.hooks.base import Plugin
    from hetfl.profiling.fleets import Fleet
    from hetfl.profiling.inspection import AxisReport, ModelReport, WidthReport
    from hetfl.profiling.planning import ClassPlan
    from hetfl.runs.cell import TrialResult


SHOWN = ("last", "last three", "p10", "loss")  # of a score in a summary; others are its task's own


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


Shown = str | Text  # a cell

PADDING = 2  # beside every column


def table(columns: Sequence[str], rows: Sequence[Sequence[Shown]], numbers: int | None = None) -> Table:
    """A plain table in which no word is broken; columns from `numbers` on hold numbers, each on one line, to the right."""
    made = Table(box=None, header_style="bold")
    least, most = find_widths(columns, rows, numbers)
    for i, width in enumerate(share_width(least, most)):
        right = numbers is not None and i >= numbers
        made.add_column(columns[i], width=width, overflow="fold", justify="right" if right else "left")
    for row in rows:
        made.add_row(*row)
    return made


def find_widths(columns: Sequence[str], rows: Sequence[Sequence[Shown]], numbers: int | None) -> tuple[list[int], list[int]]:
    """For each column the width at which no word of it is broken, and no number; and that at which nothing is."""
    least, most = [], []
    for i, column in enumerate(columns):
        cells = [clean(cell.plain if isinstance(cell, Text) else cell) for cell in (row[i] for row in rows)]
        whole = cells if numbers is not None and i >= numbers else [word for cell in cells for word in cell.split()]
        least.append(max(map(cell_len, [*column.split(), *whole, " "])))
        most.append(max(cell_len(line) for cell in [column, *cells, " "] for line in cell.splitlines() or [""]))
    return least, most


def share_width(least: Sequence[int], most: Sequence[int]) -> list[int]:
    """The columns' widths: what the terminal has beyond the least goes to those that want most."""
    widths, room = list(least), console.width - sum(least) - PADDING * len(least)
    for _ in range(max(0, room)):
        wanting = max(range(len(widths)), key=lambda i: most[i] - widths[i], default=0)
        if not widths or widths[wanting] >= most[wanting]:
            break
        widths[wanting] += 1
    return widths


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Shown]], numbers: int | None = None, keys: int = 1) -> None:
    """Prints a table; one too wide for the terminal in parts, each with the first `keys` columns, or as lines `column: value`."""
    widths = [width + PADDING for width in find_widths(columns, rows, numbers)[0]]
    first, parts = list(range(keys)), list[list[int]]()
    for i in range(keys, len(columns)):
        if parts and sum(widths[k] for k in (*first, *parts[-1], i)) <= console.width:
            parts[-1].append(i)
        else:
            parts.append([i])
    if any(sum(widths[k] for k in (*first, *part)) > console.width for part in parts):
        for row in rows:
            for column, cell in zip(columns, row, strict=True):
                say(f"{column}: {cell.plain if isinstance(cell, Text) else cell}")
            say("")
        return
    for part in parts or [[]]:
        chosen = [*first, *part]
        console.print(table([columns[k] for k in chosen], [[row[k] for k in chosen] for row in rows],
                            None if numbers is None else sum(k < numbers for k in chosen)))  # fmt: skip


def print_summary(summary: dict[str, Any], path: Path) -> None:
    """What a run came to."""
    pair, size = f"{summary['extract']} x {summary['aggregate']} on {summary['dataset']}", plural(summary["clients"], "client")
    console.print()
    say(f"{pair}: {plural(summary['rounds'], 'round')}, {size}, {summary['seconds']:.1f} s", "bold")
    print_accuracies(summary["accuracy"], summary["metric"])
    if "pre-training" in summary:
        say(describe_pretraining(summary["pre-training"], summary["accuracy"].get("global@test")))
    print_levels(summary["levels"])
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in summary["seconds by phase"].items() if seconds >= 0.005)
    say(f"bytes: {format_bytes(summary['bytes down'])} down, {format_bytes(summary['bytes up'])} up")
    say(f"seconds: {phases}; clients' own time {summary['client seconds']:.2f}")
    if "simulated seconds" in summary:
        reached = ", ".join(f"{float(t):.0%} after {s:,.0f} s" for t, s in summary["simulated seconds to accuracy"].items())
        say(f"simulated: {summary['simulated seconds']:,.1f} s, {summary['joules']:,.1f} J; {reached or 'below 50%'}")
    for note in summary["notes"]:
        say(f"note: {note}", "yellow")
    say(f"run folder: {path}")


def describe_pretraining(before: dict[str, Any], after: dict[str, float] | None) -> str:
    """What the server's pre-training gave, and what the rounds added to it."""
    points = f"; the rounds {100 * (after['last'] - before['accuracy']):+.1f} points" if after else ""
    spent = f"{before['steps']} steps on the server's {before['examples']} examples"
    return f"before round 1: global@test {before['accuracy']:.1%} after {spent}{points}"


def print_accuracies(accuracies: dict[str, dict[str, float]], metric: str) -> None:
    """Every score of a run: last round, mean of the last three, worst decile of the clients, loss and what follows from it."""
    details = ["loss", *dict.fromkeys(k for values in accuracies.values() for k in values if k not in SHOWN)]
    rows = [
        (name, percent(values["last"]), percent(values.get("last three")), percent(values.get("p10")),
         *(f"{values[detail]:.3f}" if detail in values else "" for detail in details))
        for name, values in accuracies.items()
    ]  # fmt: skip
    print_table((metric, "last round", "mean of last 3", "worst decile", *details), rows, numbers=1)


def print_levels(levels: Sequence[dict[str, Any]]) -> None:
    """What a client of each level spends in a round."""
    sizes = ("memory", "bytes down", "bytes up")
    rows = [
        (level["level"], f"{level['parameters']:,}", f"{level['MACs']:,}", *(format_bytes(level.get(n, 0)) for n in sizes),
         f"{level.get('seconds', 0):.2f}")
        for level in levels
    ]  # fmt: skip
    print_table(("level", "parameters", "MACs", "training memory", "down", "up", "seconds"), rows, numbers=0)


def print_plugins(entries: Sequence[Entry]) -> None:
    """Every plugin by role, about a line each; where the terminal is wide enough, with the paper."""
    wide = max((cell_len(f"{e.name} {e.summary} {e.paper} {e.source}") for e in entries), default=0) + 10 <= console.width
    name_width = max((cell_len(clean(e.name)) for e in entries), default=0)
    for role in dict.fromkeys(e.role for e in entries):
        say(role, "bold")
        made = Table.grid(padding=(0, 2))
        made.add_column(min_width=name_width + 2)
        for e in (e for e in entries if e.role == role):
            summary = e.summary if e.source == BUILT_IN else f"{e.summary} ({e.source})".lstrip()
            made.add_row(f"  {clean(e.name)}", summary, *([e.paper] if wide else []))
        console.print(made)
    say("hfl show NAME says more: options, paper, where it comes from")


def print_plugin(entry: Entry, plugin: type[Plugin]) -> None:
    """One plugin: what it is, its options and what its presets set."""
    say(f"{entry.role} {entry.name} ({entry.source}) {entry.paper}".rstrip(), "bold")
    console.print(cleandoc(plugin.__doc__ or entry.summary))
    facts = [f"works by {entry.granularity}"] if entry.granularity else []
    facts += [f"natural aggregation {entry.aggregate}"] if entry.aggregate else []
    facts += [
        text
        for flag, text in (
            (entry.public, "needs server data"),
            (entry.memory, "clients keep state"),
            (entry.adapter, "for adapters"),
            (entry.blocks, "for models with residual blocks"),
        )
        if flag
    ]
    if facts:
        say("; ".join(facts))
    presets: dict[str, dict[str, Any]] = getattr(plugin, "PRESETS", {})
    others = [name for name in presets if name != "default"]
    rows = [
        (f"{entry.name}.{name}", str(field.default), *(str(presets[key].get(name, "")) for key in others), field.description or "")
        for name, field in plugin.model_fields.items()
    ]
    print_table(("option", "default", *others, "meaning"), rows)
    if deviations := getattr(plugin, "DEVIATES", ()):
        say(f"where the default deviates (measured: docs/strategies/{entry.name}.md)", "bold")
        print_table(("piece", "default", "paper / reference code", "why"), deviations)


def print_presets(presets: Sequence[Preset]) -> None:
    """Every preset."""
    print_table(("preset", "what"), [(p.name, p.about) for p in presets])
    say("hfl presets NAME prints one as a run file, and says what is unlike the paper")


def print_preset(preset: Preset) -> None:
    """One preset as a run file, which `hfl run` takes; what else there is to say stands in comments."""
    say(f"# {preset.about}")
    if preset.unlike:
        say(f"# unlike the paper: {preset.unlike}")
    say(f"# sha256 of the settings {preset.digest}")
    say(tomli_w.dumps({"preset": preset.name, **preset.values}).rstrip())


def print_axes(reports: Sequence[AxisReport]) -> None:
    """What `hfl inspect --axis` measured: each axis cut by itself, with its share of the whole in memory, compute and bytes."""
    rows = []
    for r in reports:
        whole = next(other.cost for other in reports if other.axis == r.axis)
        shares = (r.cost.macs / whole.macs, r.cost.memory / whole.memory, r.cost.bytes / whole.bytes)
        macs, memory, payload = (f"{share:.1%}" for share in shares)
        rows.append(
            (r.axis, f"{r.ratio:g}", f"{r.cost.parameters:,}", f"{r.trained:,}", f"{r.cost.macs:,} ({macs})",
             f"{format_bytes(r.cost.memory)} ({memory})", f"{format_bytes(r.cost.bytes)} ({payload})")
        )  # fmt: skip
    print_table(("axis", "level", "parameters", "trained", "MACs", "training memory", "payload"), rows, numbers=1, keys=2)


def print_model_report(report: ModelReport) -> None:
    """What `hfl inspect` found."""
    widths, inputs, groups = report.widths, report.inputs, plural(len(report.widths.groups), "width group")
    kind = f"{inputs.vocab} token ids" if inputs.vocab else "x".join(map(str, inputs.shape))
    say(
        f"{report.model} for {kind}, {inputs.classes} classes: {groups}, {widths.elastic():.1%} of its "
        f"entries can be cut (traced and proven in {report.seconds:.1f} s)", "bold",
    )  # fmt: skip
    cuts = [(g.name, str(g.size), list_some(report.members[g.name])) for g in widths.groups]
    print_table(("group", "units", "cuts"), cuts)
    print_table(("frozen", "why"), list(widths.frozen.items()))
    say(f"residual blocks that may be left out: {', '.join(report.blocks) or 'none'}")
    rows = [
        (f"{level.ratio:g}", f"{level.cost.parameters:,}", f"{level.cost.macs:,}", format_bytes(level.cost.memory),
         format_bytes(level.cost.bytes), f"{level.error:.1e}")
        for level in report.levels
    ]  # fmt: skip
    print_table(("level", "parameters", "MACs", "training memory", "payload", "sliced - masked"), rows, numbers=0)


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
    print_table(("width", "parameters", "MACs", "training memory", "step", "affordable"), rows)
    best = max((r.ratio for r in reports if not r.exceeded), default=None)
    verdict = "affords no width of it" if best is None else f"affords width {best:g}"
    next_up = min((r for r in reports if r.exceeded and (best is None or r.ratio > best)), key=lambda r: r.ratio, default=None)
    why = f"; width {next_up.ratio:g} is too much: {next_up.exceeded}" if next_up else ""
    say(f"{model}: this machine {verdict}{why}", "bold")


def print_fleets(fleets: Sequence[Fleet]) -> None:
    """Every fleet."""
    for f in fleets:
        when = f"there as {f.availability}" if f.availability else "always there"
        say(f"{f.name}: {f.about}; {f.mix}; {f.down[0]:g} / {f.up[0]:g} Mb/s down / up; {when}")


def print_fleet(fleet: Fleet) -> None:
    """One fleet: its classes, and where every figure comes from."""
    say(f"{fleet.name}: {fleet.about} ({fleet.mix})", "bold")
    kinds, reference = {name: fleet.typical(name) for name in dict.fromkeys(n for n, _ in fleet.members())}, fleet.reference.step[1]
    shown = [
        (name, d.what, "measured" if fleet.kinds[name].step else f"{reference / d.step.mac:.3g} x", format_bytes(d.memory),
         f"{d.watts:g}", f"{8e-6 * d.down:g} / {8e-6 * d.up:g}")
        for name, d in kinds.items()
    ]  # fmt: skip
    console.print(table(("class", "what", "speed", "for training", "W", "Mb/s down / up"), shown))
    sources = {fleet.name: fleet.source, **{name: fleet.kinds[name].source for name in kinds}, "speed 1": fleet.reference.source}
    sources |= {"availability": fleet.rhythm.source} if fleet.rhythm else {}
    for name, source in sources.items():
        say(f"{name}: {source}")


def print_plans(title: str, plans: Mapping[str, tuple[list[str], list[ClassPlan]]], rounds: int) -> None:
    """What each class of a fleet holds under the extractions of each kind."""
    from hetfl.profiling.planning import COMPUTES

    for kind, (names, classes) in plans.items():
        say(f"{title}: {', '.join(names)} (a client computes {COMPUTES[kind]})", "bold")
        rows = [
            (c.name, f"{c.share:.0%}", "none" if c.width is None else f"{c.width:g}", f"{c.spent.seconds:,.3g}",
             f"{c.spent.down:,.3g} / {c.spent.compute:,.3g} / {c.spent.up:,.3g}", f"{c.spent.joules:,.3g}", format_bytes(c.bytes),
             c.binds or "nothing")
            for c in classes
        ]  # fmt: skip
        columns = ("class", "share", "width", "s a round", "down / train / up", "J", "sent", "what binds")
        console.print(table(columns, rows))
        if held := [c for c in classes if c.width is not None]:
            seconds = max(c.spent.seconds for c in held)
            share = sum(c.share for c in held)
            say(f"{rounds} rounds with {share:.0%} of the fleet: {rounds * seconds / 3600:,.3g} h, the slowest class waited for")
        else:
            say("no class can take part")


Rows = tuple[list[str], list[list[str]]]


def leaderboard_rows(results: Sequence[TrialResult], metric: str) -> Rows:
    """Columns and rows of the leaderboard: mean and standard deviation over the seeds at every point, by mean rank."""
    from hetfl.rounds.rows import MEAN_LEVEL, WORST_LEVEL
    from hetfl.runs import leaderboard

    points = list(dict.fromkeys(r.trial.point for r in results))
    board = leaderboard.rank_pairs(results, metric)
    levels = [name for name in (MEAN_LEVEL, WORST_LEVEL) if name != metric and any(name in row.levels for row in board)]
    rows = []
    for row in board:
        values = [format_spread(*row.values[p]) if p in row.values else "" for p in points]
        more = [f"{100 * row.levels[name]:.1f}" if name in row.levels else "" for name in levels]
        rows.append([f"{row.rank:.1f}" if row.values else "", row.extract, row.aggregate, *values, *more, row.why])
    columns = ["rank", "extract", "aggregate", *(leaderboard.point_label(p) for p in points)]
    columns += [name.removesuffix("@test") for name in levels]
    if any(row[-1] for row in rows):
        return [*columns, "why"], rows
    return columns, [row[:-1] for row in rows]


def leaderboard_table(results: Sequence[TrialResult], metric: str) -> Table:
    """The leaderboard while a sweep runs."""
    return table(*leaderboard_rows(results, metric))


def format_spread(mean: float, std: float, half: float, seeds: int) -> str:
    """`71.3 ± 0.8`, in percent, with the standard deviation; the mean alone where there is one seed."""
    return f"{100 * mean:.1f}" + (f" ± {100 * std:.1f}" if seeds > 1 else "")


def print_leaderboard(results: Sequence[TrialResult], metric: str, out: Path) -> None:
    """What a sweep came to."""
    seeds = len({r.trial.seed for r in results})
    console.print()
    say(
        f"{metric}, %, mean ± standard deviation over {seeds} seeds, by mean rank" if seeds > 1 else f"{metric}, %, one seed",
        "bold",
    )
    print_table(*leaderboard_rows(results, metric), keys=3)
    if seeds == 2:
        say("two seeds say little: a 95 % interval is 9 standard deviations to either side (leaderboard.csv)", "yellow")
    elif seeds > 2:
        say("95 % intervals (Student's t) are in leaderboard.csv; hfl compare says which differences are significant")
    say(f"folder: {out} (matrix.csv, matrix.parquet, leaderboard.csv, pictures, cells/)")


def print_written_leaderboard(rows: Sequence[dict[str, str]], path: Path) -> None:
    """A leaderboard as leaderboard.csv has it: a row a pair and point."""
    from hetfl.rounds.rows import MEAN_LEVEL, WORST_LEVEL
    from hetfl.runs.leaderboard import HALF

    fixed = ("extract", "aggregate", "mean rank", "metric", "mean", "std", HALF, "seeds", "why", MEAN_LEVEL, WORST_LEVEL)
    points = [name for name in rows[0] if name not in fixed] if rows else []
    say(f"{rows[0]['metric']}, %, mean ± standard deviation over seeds, by mean rank" if rows else "no run has ended", "bold")
    shown = []
    for row in rows:
        rank, value = row["mean rank"], row.get("mean")
        found = format_spread(float(value), float(row["std"] or "nan"), 0.0, int(float(row["seeds"]))) if value else ""
        rank = f"{float(rank):.1f}" if value else ""
        shown.append((rank, row["extract"], row["aggregate"], *(row[p] or "" for p in points), found, row.get("why") or ""))
    print_table(("rank", "extract", "aggregate", *points, "accuracy", ""), shown, keys=3)
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
    print_table(columns, shown, numbers=0)
    if len(rows) > 1:
        power = scaling.growth_exponent(rows, "server seconds")
        say(f"server seconds grow as clients^{power:.2f} from {rows[0]['clients']:,} to {rows[-1]['clients']:,}")
    say(f"folder: {out} (scale.csv, scale.png, a run folder for each number of clients)")
