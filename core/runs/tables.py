"""Published tables as data: plugins/tables.toml, and the files of the same form that installed packages bring."""

from __future__ import annotations

import tomllib
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any

from pydantic import BaseModel, Field, StringConstraints, ValidationError

from hetfl.config import merge_options, resolve
from hetfl.errors import UsageError, nearest, unknown
from hetfl.files import find_resource
from hetfl.presets import find_preset
from hetfl.runs.cell import Trial, check_metric

PATH = find_resource("plugins/tables.toml", "plugins/tables.toml")
MEGABYTES = "MB"  # a value of a row beside its accuracies: what all clients were sent and sent in all rounds

Amount = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(ge=1, strict=True)]
Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Values = dict[str, Amount]  # by metric

OURS = {"preset": "it is a key of the row", "seed": "a row has `seeds`", "device": "hfl reproduce has --device"}


class RowFile(BaseModel, extra="forbid"):
    """A row as a file has it."""

    name: Text
    preset: str | None = None
    options: dict[str, Any] = {}
    published: Annotated[Values, Field(min_length=1)]
    others: dict[str, Values] = {}
    band: Amount | Values | None = None
    seeds: Count | None = None
    minutes: Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)] | None = None
    unlike: str = ""
    disputed: str = ""


class TableFile(BaseModel, extra="forbid"):
    """A table as a file has it; its band, seeds and unlike are those of its rows, too."""

    paper: Text
    about: Text
    source: Text
    band: Amount | Values = 1.0
    band_from: str = ""
    seeds: Count = 3
    unlike: str = ""
    finding: str = ""
    rows: Annotated[list[RowFile], Field(min_length=1)]


@dataclass(frozen=True, eq=False)
class TableRow:
    """One row of a published table: the run that stands for it, and its values.

    `published` and `others` (by who measured) hold accuracies in percent and megabytes by metric. `band` is how far from the
    printed value ours may be, in points (of MB in percent); by metric, one that it leaves out is not judged. `unlike` says what
    our run does otherwise than the paper's, sentence by sentence; `disputed` why the printed value is not believed; `minutes`
    the minutes that one seed took.
    """

    table: str
    name: str
    options: Mapping[str, Any]
    published: Mapping[str, float]
    others: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    band: float | Mapping[str, float] = 1.0
    seeds: int = 3
    minutes: float | None = None
    unlike: tuple[str, ...] = ()
    disputed: str = ""

    def trials(self, seeds: int | None = None, **more: Any) -> list[Trial]:
        """The runs of this row, by seed; `more` are options of the run that change no setting of the paper's (device, say)."""
        return [
            Trial((("table", self.table), ("row", self.name)), resolve(merge_options(self.options, {**more, "seed": seed})))
            for seed in range(seeds or self.seeds)
        ]

    def find_band(self, metric: str) -> float | None:
        """How far ours may be; None where the metric is not judged."""
        return self.band.get(metric) if isinstance(self.band, Mapping) else self.band


@dataclass(frozen=True)
class PaperTable:
    """A published table; `band_from` says where its band comes from, `finding` what our runs of it came to."""

    name: str
    paper: str
    about: str
    source: str
    band: float | Mapping[str, float]
    band_from: str
    finding: str
    rows: tuple[TableRow, ...]

    def describe_band(self) -> str:
        """The band in words."""
        bands = self.band if isinstance(self.band, Mapping) else {"": self.band}
        units = {metric: "%" if metric == MEGABYTES else "point" if band == 1 else "points" for metric, band in bands.items()}
        said = [f"{band:g} {units[metric]}{metric and f' of {metric}'}" for metric, band in bands.items()]
        return (", ".join(said) or "none") + (f" ({self.band_from})" if self.band_from else "")


def tables() -> dict[str, PaperTable]:
    """The tables by name: the built-in ones, and those of installed packages that name themselves under `hetfl.tables`.

    Such a package holds a file tables.toml of the same form as plugins/tables.toml; a file that cannot be used costs no other's
    tables (`find_faults`).
    """
    return read_tables()[0]


def find_faults() -> tuple[str, ...]:
    """A sentence for each installed package whose tables cannot be used: what is wrong with them."""
    return read_tables()[1]


@cache
def read_tables() -> tuple[dict[str, PaperTable], tuple[str, ...]]:
    """What `tables` and `find_faults` give. Raises UsageError for what is wrong with the built-in tables."""
    found, faults = read_text("hetfl", PATH.read_text(encoding="utf-8")), []
    for point in entry_points(group="hetfl.tables"):
        try:
            found |= read_text(point.value, read_file(point), found)
        except UsageError as error:
            faults.append(str(error))
    return found, tuple(faults)


def read_text(package: str, text: str, known: Container[str] = ()) -> dict[str, PaperTable]:
    """The tables in the `text` of a package's tables.toml, by name, none of which is `known` already. Raises UsageError for the
    first thing that is wrong."""
    with saying(f"tables.toml of {package}"):
        given = tomllib.loads(text)
        if twice := [name for name in given if name in known]:
            raise UsageError(f"there is another table '{twice[0]}'; uninstall one of the two packages")
        return {name: read_table(name, values) for name, values in given.items()}


def read_file(point: EntryPoint) -> str:
    """The tables.toml of an installed package. Raises UsageError where there is none."""
    try:
        return (resources.files(point.value) / "tables.toml").read_text("utf-8")
    except (Exception, SystemExit) as error:  # whatever a package's own code can raise
        where = f"tables.toml of {point.value} (entry point '{point.name}' of hetfl.tables)"
        raise UsageError(f"{where} cannot be read: {type(error).__name__}: {error}") from error


@contextmanager
def saying(where: str) -> Iterator[None]:
    """What is wrong with what is read within is said with `where` before it, as UsageError."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UsageError(f"{where} is not TOML: {error}") from error


def read_table(name: str, values: Any) -> PaperTable:
    """A table from its TOML: each row is a preset, with `options` over it, and has the table's values where it names none.

    Raises UsageError for the first thing that is wrong with it.
    """
    with saying(f"table '{name}'"):
        try:
            given = TableFile.model_validate(values)
        except ValidationError as error:
            raise UsageError(explain(error, values)) from error
        rows = tuple(read_row(name, given, row) for row in given.rows)
        if twice := [row.name for i, row in enumerate(rows) if row.name in {other.name for other in rows[:i]}]:
            raise UsageError(f"two rows bear the name '{twice[0]}'")
        return PaperTable(name, given.paper, given.about, given.source, given.band, given.band_from, given.finding, rows)


def explain(error: ValidationError, values: Any) -> str:
    """One sentence for the first thing that is wrong with the table `values`."""
    first = next((found for found in error.errors() if found["type"] == "extra_forbidden"), error.errors()[0])
    place, row = list(first["loc"]), ""
    kind: type[BaseModel] = TableFile
    if place[:1] == ["rows"] and len(place) > 1:
        number, kind = place[1], RowFile
        found = values["rows"][number]
        row = f"row '{found['name']}': " if isinstance(found, Mapping) and found.get("name") else f"row {int(number) + 1}: "
        place = place[2:]
    key = str(place[0]) if place else ""
    if first["type"] == "extra_forbidden":
        return f"{row}{unknown('key', key, kind.model_fields)}"
    if first["type"] == "missing":
        return f"{row}'{key}' is missing"
    return f"{row}{key and f'{key}: '}{first['msg'][0].lower()}{first['msg'][1:]} (got {first['input']!r})"


def read_row(table: str, common: TableFile, given: RowFile) -> TableRow:
    """A row from its file; what its table and its preset say to be unlike the paper is said of it too. With `set = {}`
    it has none of the preset's options of plugins."""
    with saying(f"row '{given.name}'"):
        options, sentences = given.options, [common.unlike, given.unlike]
        if mine := [name for name in OURS if name in options]:
            raise UsageError(f"options: '{mine[0]}' is no option of a row ({OURS[mine[0]]})")
        if given.preset is not None:
            preset = find_preset(given.preset)
            kept = {name: value for name, value in preset.values.items() if name != "set" or options.get("set") != {}}
            options, sentences = merge_options({**kept, "preset": preset.name}, options), [*sentences, preset.unlike]
        for metric, value in [pair for values in (given.published, *given.others.values()) for pair in values.items()]:
            if metric != MEGABYTES:
                check_metric(metric)
                if value > 100:
                    raise UsageError(f"{metric} is in percent, not {value:g}")
            if metric not in given.published:
                raise UsageError(f"others: {metric} is no value of the paper's here (published: {', '.join(given.published)})")
        band = common.band if given.band is None else given.band
        for metric in band if isinstance(band, Mapping) else ():
            if metric != MEGABYTES:
                check_metric(metric)
        resolve(options)
        return TableRow(
            table, given.name, options, given.published, given.others, band,
            given.seeds or common.seeds, given.minutes, tuple(dict.fromkeys(filter(None, "; ".join(sentences).split("; ")))),
            given.disputed,
        )  # fmt: skip


def find_rows(table: str | None, names: Sequence[str]) -> list[TableRow]:
    """The rows of a table, or of all: those of the names given, or, where no row has such a name, those with it in theirs.

    Raises UsageError where there is no such table or row.
    """
    if table is not None and table not in tables():
        raise UsageError("; ".join([str(unknown("table", table, set(tables()))), *find_faults()]))
    rows = [row for t in tables().values() if table in (None, t.name) for row in t.rows]
    chosen = list[TableRow]()
    for name in names:
        word = name.lower()
        found = [row for row in rows if row.name.lower() == word] or [row for row in rows if word in row.name.lower()]
        if not found:
            known = dict.fromkeys(row.name for row in rows)
            raise UsageError(f"no row is called '{name}'{nearest(name, known)} (hfl reproduce --list shows them)")
        chosen += found
    return list(dict.fromkeys(chosen)) if names else rows


def list_unlike(rows: Sequence[TableRow]) -> dict[str, str]:
    """What runs of these rows do otherwise than the paper's, each sentence once, by the names of the rows that it holds for: "" for
    all of them."""
    holds: dict[str, list[str]] = {}
    for row in rows:
        for sentence in row.unlike:
            holds.setdefault(sentence, []).append(row.name)
    found: dict[str, list[str]] = {"": []}
    for sentence, names in holds.items():
        found.setdefault("" if len(names) == len(rows) else ", ".join(names), []).append(sentence)
    return {names: "; ".join(sentences) for names, sentences in found.items() if sentences}
