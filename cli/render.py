"""What the terminal shows: the live rounds, a run's summary, the lists of plugins."""

from __future__ import annotations

import time
from collections.abc import Sequence
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w
from rich.console import Console, Group
from rich.live import Live as Screen
from rich.table import Table
from rich.text import Text

from hetfl.config import RunOptions
from hetfl.presets import Preset
from hetfl.registry import Entry

if TYPE_CHECKING:
    from hetfl.hooks.base import Plugin
    from hetfl.profiling.inspection import ModelReport, WidthReport
    from hetfl.runs.cell import TrialResult

console = Console(highlight=False)

errors = Console(stderr=True, highlight=False, soft_wrap=True)

SHOWN = 12

SIZES = ("memory", "bytes down", "bytes up")


def complain(text: str) -> None:
    """One error sentence on stderr."""
    errors.print(Text(f"hfl: {text}", style="red"))


class Live:
    """A table of the rounds that grows while they run; one plain line a round where the output is no terminal."""

    def __init__(self, options: RunOptions, path: Path) -> None:
        self.options, self.path, self.rows, self.notes = options, path, list[dict[str, Any]](), list[str]()
        self.started, self._phase = time.perf_counter(), "starting"
        self._screen = Screen(console=console, auto_refresh=False, transient=False) if console.is_terminal else None

    def __enter__(self) -> Live:
        console.print(f"{title(self.options)} -> {self.path}", soft_wrap=True)
        if self._screen:
            self._screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._screen:
            self._phase = ""
            self._refresh()
            self._screen.stop()

    def phase(self, round: int, name: str) -> None:
        self._phase = f"round {round}: {name}" if round else name
        self._refresh()

    def note(self, text: str) -> None:
        self.notes.append(text)
        self._refresh()
        if not self._screen:
            console.print(f"note: {text}", soft_wrap=True)

    def alarm(self, text: str) -> None:
        self.notes.append(f"ALARM: {text}")
        self._refresh()
        if not self._screen:
            console.print(f"ALARM: {text}", style="bold red", soft_wrap=True)

    def done(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._refresh()
        if not self._screen:
            console.print(line(row, self.options.rounds), soft_wrap=True)

    def _refresh(self) -> None:
        if self._screen:
            self._screen.update(Group(self._table(), Text(self._status()), *(shown(n) for n in self.notes[-4:])))
            self._screen.refresh()

    def _status(self) -> str:
        if not self._phase:
            return ""
        left = ""
        if self.rows:
            each = sum(r["seconds"] for r in self.rows) / len(self.rows)
            left = f", about {each * (self.options.rounds - len(self.rows)):.0f} s left"
        return f"{self._phase} ({time.perf_counter() - self.started:.0f} s{left})"

    def _table(self) -> Table:
        table = Table(box=None, header_style="bold")
        for column in ("round", "global@test", "loss", "control", "client@own", "down", "up", "seconds"):
            table.add_column(column, justify="right")
        for row in self.rows[-SHOWN:]:
            table.add_row(str(row["round"]), *cells(row))
        return table


def shown(note: str) -> Text:
    return Text(note, "bold red") if note.startswith("ALARM") else Text(f"note: {note}", "yellow")


def title(options: RunOptions) -> str:
    partner = options.aggregate or "its natural aggregation"
    what = f"{options.extract} x {partner} on {options.dataset}"
    return f"{what}, {options.clients} clients, {options.rounds} rounds, seed {options.seed}"


def cells(row: dict[str, Any]) -> list[str]:
    loss = f"{row['global@test loss']:.3f}" if "global@test loss" in row else ""
    shares = [share(row.get(name)) for name in ("global@test", "control@test", "client@own")]
    return [shares[0], loss, *shares[1:], size(row["bytes down"]), size(row["bytes up"]), f"{row['seconds']:.2f}"]


def line(row: dict[str, Any], rounds: int) -> str:
    names = ("global@test", "loss", "control", "client@own", "down", "up", "seconds")
    told = " ".join(f"{name} {value}" for name, value in zip(names, cells(row), strict=True) if value)
    return f"round {row['round']}/{rounds} {told}"


def share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return ""


def summary(summary: dict[str, Any], path: Path) -> None:
    """What a run came to."""
    console.print()
    console.print(f"{summary['extract']} x {summary['aggregate']} on {summary['dataset']}: {summary['rounds']} rounds,"
                  f" {summary['clients']} clients, {summary['seconds']:.1f} s", style="bold", soft_wrap=True)  # fmt: skip
    console.print(accuracies(summary["accuracy"]))
    console.print(levels(summary["levels"]))
    told = ", ".join(f"{name} {seconds:.2f}" for name, seconds in summary["seconds by phase"].items() if seconds >= 0.005)
    console.print(f"bytes: {size(summary['bytes down'])} down, {size(summary['bytes up'])} up", soft_wrap=True)
    console.print(f"seconds: {told}; clients' own time {summary['client seconds']:.2f}", soft_wrap=True)
    for note in summary["notes"]:
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
    console.print(f"run folder: {path}", soft_wrap=True)


def accuracies(found: dict[str, dict[str, float]]) -> Table:
    table = Table(box=None, header_style="bold")
    for column in ("accuracy", "last round", "mean of last 3", "worst decile", "loss"):
        table.add_column(column, justify="left" if column == "accuracy" else "right")
    for name, values in found.items():
        loss = f"{values['loss']:.3f}" if "loss" in values else ""
        table.add_row(name, share(values["last"]), share(values["last three"]), share(values.get("p10")), loss)
    return table


def levels(found: Sequence[dict[str, Any]]) -> Table:
    """What a client of each level spends in a round."""
    names = ("level", "parameters", "MACs", "training memory", "down", "up", "seconds")
    rows = [
        (level["level"], f"{level['parameters']:,}", f"{level['MACs']:,}", *(size(level.get(n, 0)) for n in SIZES),
         f"{level.get('seconds', 0):.2f}")
        for level in found
    ]  # fmt: skip
    return table(names, rows, right=True)


def plugins(entries: Sequence[Entry]) -> None:
    """Every plugin by role."""
    table = Table(box=None, header_style="bold")
    for column in ("role", "name", "summary", "paper", "from"):
        table.add_column(column, overflow="fold")
    for entry in entries:
        table.add_row(entry.role, entry.name, entry.summary, entry.paper, entry.source)
    console.print(table)


def presets(found: Sequence[Preset]) -> None:
    """Every preset."""
    console.print(table(("preset", "what", "unlike the paper"), [(p.name, p.about, p.unlike) for p in found]))


def preset(found: Preset) -> None:
    """One preset's settings, as a run file, and their hash."""
    console.print(f"{found.name}: {found.about}", style="bold", soft_wrap=True)
    if found.unlike:
        console.print(f"unlike the paper: {found.unlike}", soft_wrap=True)
    console.print(Text(tomli_w.dumps(found.values)), soft_wrap=True)
    console.print(f"sha256 {found.digest}", soft_wrap=True)


def plugin(entry: Entry, strategy: type[Plugin]) -> None:
    """One plugin: what it is, its options and what its presets set."""
    console.print(f"{entry.role} {entry.name} ({entry.source}) {entry.paper}".rstrip(), style="bold", soft_wrap=True)
    console.print(Text(cleandoc(strategy.__doc__ or entry.summary)))
    presets: dict[str, dict[str, Any]] = getattr(strategy, "PRESETS", {})
    table = Table(box=None, header_style="bold")
    for column in ("option", "default", *(name for name in presets if name != "default"), "meaning"):
        table.add_column(column, overflow="fold")
    for name, field in strategy.model_fields.items():
        others = [str(values[name]) if name in values else "" for key, values in presets.items() if key != "default"]
        table.add_row(f"{entry.name}.{name}", str(field.default), *others, field.description or "")
    console.print(table)
    if rows := getattr(strategy, "DEVIATES", ()):
        console.print(f"where the default deviates (measured: docs/strategies/{entry.name}.md)", style="bold", soft_wrap=True)
        console.print(deviations(rows))


def survey(found: ModelReport) -> None:
    """What `hfl inspect` found."""
    widths, inputs = found.widths, found.inputs
    kind = f"{inputs.vocab} token ids" if inputs.vocab else "x".join(map(str, inputs.shape))
    console.print(
        f"{found.model} for {kind}, {inputs.classes} classes: {len(widths.groups)} width groups, {widths.elastic():.1%} of its "
        f"entries can be cut (traced and proven in {found.seconds:.1f} s)", style="bold", soft_wrap=True,
    )  # fmt: skip
    console.print(table(("group", "units", "cuts"), [(g.name, str(g.size), several(found.members[g.name])) for g in widths.groups]))
    console.print(table(("frozen", "why"), list(widths.frozen.items())))
    rows = [
        (f"{level.ratio:g}", f"{level.cost.parameters:,}", f"{level.cost.macs:,}", size(level.cost.memory), size(level.cost.bytes),
         f"{level.error:.1e}")
        for level in found.levels
    ]  # fmt: skip
    console.print(table(("level", "parameters", "MACs", "training memory", "payload", "sliced - masked"), rows, right=True))


def offers(model: str, found: Sequence[WidthReport]) -> None:
    """What `hfl profile` measured, and the width that this machine affords."""
    rows = [
        (f"{o.ratio:g}", f"{o.cost.parameters:,}", f"{o.cost.macs:,}", size(o.cost.memory), f"{1000 * o.seconds:.2f} ms",
         o.exceeded or "yes")
        for o in found
    ]  # fmt: skip
    console.print(table(("width", "parameters", "MACs", "training memory", "step", "affordable"), rows, right=True))
    best = max((o.ratio for o in found if not o.exceeded), default=None)
    told = "affords no width of it" if best is None else f"affords width {best:g}"
    next_up = min((o for o in found if o.exceeded and (best is None or o.ratio > best)), key=lambda o: o.ratio, default=None)
    why = f"; beyond that binds {next_up.exceeded}" if next_up else ""
    console.print(f"{model}: this machine {told}{why}", style="bold", soft_wrap=True)


class Board:
    """The standings of a matrix while it runs; one plain line a cell where the output is no terminal."""

    def __init__(self, cells: int, metric: str) -> None:
        self._cells, self._metric, self._started = cells, metric, time.perf_counter()
        self._screen = Screen(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Board:
        if self._screen:
            self._screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._screen:
            self._screen.stop()

    def show(self, outcomes: Sequence[TrialResult]) -> None:
        done, new = len(outcomes), outcomes[-1]
        status = f"{done} of {self._cells} cells, {sum(o.cached for o in outcomes)} of them from before"
        if self._screen:
            self._screen.update(
                Group(standings(outcomes, self._metric), Text(f"{status} ({time.perf_counter() - self._started:.0f} s)"))
            )
            self._screen.refresh()
        else:
            told = share(new.row.get(self._metric)) if new.status == "ok" else f"{new.status}: {new.row['why']}"
            at = ", ".join(f"{name} {value}" for name, value in new.cell.point)
            console.print(f"[{done}/{self._cells}] {new.cell.extract} x {new.cell.aggregate} {at} seed {new.cell.seed}: {told}",
                          soft_wrap=True, markup=False)  # fmt: skip


def standings(outcomes: Sequence[TrialResult], metric: str) -> Table:
    """Mean and 95 % interval over the seeds at every point, by mean rank."""
    from hetfl.runs import leaderboard as board

    points = list(dict.fromkeys(o.cell.point for o in outcomes))
    rows = []
    for s in board.leaderboard(outcomes, metric):
        told = [spread(*s.values[p]) if p in s.values else "" for p in points]
        rows.append((f"{s.rank:.1f}" if s.values else "", s.extract, s.aggregate, *told, s.why))
    columns = ("rank", "extract", "aggregate", *(board.label(p) for p in points), "")
    return table(columns, rows)


def spread(mean: float, half: float, seeds: int) -> str:
    return f"{100 * mean:.1f}" + (f" ± {100 * half:.1f}" if seeds > 1 else "")


def leaderboard(outcomes: Sequence[TrialResult], metric: str, out: Path) -> None:
    """What a matrix came to."""
    console.print()
    console.print(f"{metric}, %, mean over seeds and 95 % interval, by mean rank", style="bold", soft_wrap=True)
    console.print(standings(outcomes, metric))
    console.print(f"folder: {out} (matrix.csv, matrix.parquet, leaderboard.csv, heatmap.png, cells/)", soft_wrap=True)


def scaled(row: dict[str, Any]) -> None:
    """One line of `hfl scale` as soon as it is there."""
    console.print(f"{row['clients']:,} clients: {row['server seconds']:.3g} s of server time a round", soft_wrap=True)


def growth(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """What a round costs the server, by the number of clients."""
    from hetfl.runs import scaling as scale

    phases = [name for name in scale.SERVER if max(r[f"{name} seconds"] for r in rows) >= 0.001]
    columns = ("clients", "server s", "ms a client", *phases, "MB down", "MB up", "peak MB")
    shown = [
        [f"{r['clients']:,}", f"{r['server seconds']:.3g}", f"{r['server ms a client']:.3g}",
         *(f"{r[f'{name} seconds']:.3f}" for name in phases),
         *(f"{r[name] / 1e6:,.3g}" for name in ("bytes down", "bytes up")), f"{r['peak memory'] / 1e6:,.0f}"]
        for r in rows
    ]  # fmt: skip
    console.print(table(columns, shown, right=True))
    if len(rows) > 1:
        power = scale.growth(rows, "server seconds")
        console.print(f"server seconds grow as clients^{power:.2f} from {rows[0]['clients']:,} to {rows[-1]['clients']:,}")
    console.print(f"folder: {out} (scale.csv, scale.png, a run folder for each number of clients)", soft_wrap=True)


def several(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: bool = False) -> Table:
    made = Table(box=None, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold", justify="right" if right or column == "units" else "left")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def deviations(rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=None, header_style="bold")
    for column in ("piece", "default", "paper / reference code", "why"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
