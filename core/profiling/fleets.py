"""Fleets as data: device classes, how they are mixed, their networks, and when they are there (plugins/fleets.toml)."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import astuple
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import torch
from pydantic import AfterValidator, Field, ValidationError, model_validator

from hetfl.config import Options, merge_options
from hetfl.errors import UsageError, nearest
from hetfl.files import find_resource, reason
from hetfl.profiling.availability import Availability
from hetfl.profiling.capacity import assign_mix, parse_mix, parse_quantity
from hetfl.profiling.device import Device
from hetfl.profiling.steptime import StepTime
from hetfl.rng import stream

PATH = find_resource("plugins/fleets.toml", "plugins/fleets.toml")

MEGABIT, NANOJOULE_A_BIT = 1e6 / 8, 8e-9  # bytes; joules a byte


def check_spread(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] < 0 or pair[1] < 0:
        raise ValueError("a median and a sigma, neither negative, are needed")
    return pair


def check_positive(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] <= 0:
        raise ValueError("a median above 0 is needed")
    return check_spread(pair)


def check_quantity(text: str) -> str:
    parse_quantity(text)
    return text


Spread = Annotated[tuple[float, float], AfterValidator(check_spread)]  # median, sigma of the logarithm
Bandwidth = Annotated[tuple[float, float], AfterValidator(check_positive)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Reference(Options):
    """The machine that peak TFLOP/s are held against."""

    step: tuple[NotNegative, NotNegative, NotNegative]
    tflops: Positive
    source: str = Field(alias="from")


class DeviceClass(Options):
    """A kind of device, as plugins/fleets.toml says."""

    what: str
    memory: Annotated[str, AfterValidator(check_quantity)]
    tflops: Positive | None = None
    step: tuple[NotNegative, NotNegative, NotNegative] | None = None
    watts: Positive
    down: Bandwidth | None = None
    up: Bandwidth | None = None
    latency: Spread | None = None
    source: str = Field(alias="from")

    @model_validator(mode="after")
    def _can_be_timed(self) -> DeviceClass:
        if self.tflops is None and not any(self.step or ()):
            raise ValueError("tflops or step, with a part above 0, is needed")
        return self


class Rhythm(Options):
    """When devices are there."""

    session: Spread
    gap: Spread
    longest: Positive = 10 * 86400.0
    rhythm: dict[str, Positive] = {}
    source: str = Field(alias="from")

    @model_validator(mode="after")
    def _hours_of_a_day(self) -> Rhythm:
        if not all(hour.replace(".", "", 1).isdigit() and float(hour) < 24 for hour in self.rhythm):
            raise ValueError("rhythm has hours of the day, 0 to below 24")
        return self


class Fleet(Options):
    """A mix of device classes; every client's device follows from the seed and its id."""

    name: str
    about: str
    mix: str = Field(alias="classes")
    speed: NotNegative = 0.0
    share: float = Field(0.5, gt=0, le=1)
    down: Bandwidth = (20.0, 0.0)
    up: Bandwidth = (20.0, 0.0)
    latency: Spread = (0.01, 0.0)
    nj_down: NotNegative = 137.0
    nj_up: NotNegative = 283.0
    availability: str | None = None
    source: str = Field(alias="from")
    kinds: dict[str, DeviceClass]
    reference: Reference
    rhythm: Rhythm | None = None

    @model_validator(mode="after")
    def _classes_exist(self) -> Fleet:
        for name, _ in parse_mix(self.mix, str):
            if name not in self.kinds:
                raise ValueError(f"no device class '{name}'{nearest(name, self.kinds)} (classes: {', '.join(self.kinds)})")
        return self

    def members(self) -> list[tuple[str, float]]:
        """The classes and their counts or shares."""
        return [(name, float(share)) for name, share in parse_mix(self.mix, str)]

    def device(self, client: int, clients: int, seed: int) -> Device:
        """The device of a client: its class by the mix, speed and network drawn once from the client's stream."""
        name = assign_mix(self.mix, str, clients)[client]
        return self.draw(name, torch.randn(4, generator=stream(seed, "device", 0, client), dtype=torch.float64).tolist())

    def typical(self, name: str) -> Device:
        """The median device of a class."""
        return self.draw(name, [0.0] * 4)

    def draw(self, name: str, z: list[float]) -> Device:
        """The device of class `name` at these standard normal values of speed, down, up and latency."""
        kind = self.kinds[name]
        peak = kind.tflops if kind.tflops is not None else self.reference.tflops
        step = StepTime(*(kind.step or self.reference.step))
        slower = (1.0 if kind.step else self.reference.tflops / peak) / math.exp(self.speed * z[0])
        pairs = (kind.down or self.down, kind.up or self.up, kind.latency or self.latency)
        down, up, latency = (median * math.exp(sigma * v) for (median, sigma), v in zip(pairs, z[1:], strict=True))
        joules = self.nj_down * NANOJOULE_A_BIT, self.nj_up * NANOJOULE_A_BIT
        memory = parse_quantity(kind.memory) * self.share
        return Device(
            name, kind.what, step.scaled(slower), peak, memory, kind.watts, down * MEGABIT, up * MEGABIT, latency, *joules
        )  # fmt: skip

    def when(self, seed: int) -> Availability | None:
        """When its devices are there; None: always."""
        if (r := self.rhythm) is None:
            return None
        return Availability(r.session, r.gap, r.longest, {float(hour): rate for hour, rate in r.rhythm.items()}, seed)


@cache
def read_builtin() -> dict[str, Any]:
    """plugins/fleets.toml."""
    return tomllib.loads(PATH.read_text(encoding="utf-8"))


def list_fleets() -> list[Fleet]:
    """The fleets that come with hetfl."""
    return [make_fleet(read_builtin(), name) for name in read_builtin()["fleet"]]


@cache
def find_fleet(name: str) -> Fleet:
    """The fleet of that name, of the file of that name, or of a mix of classes such as nano:4,rpi4:6. Raises UsageError."""
    table = read_builtin()
    if name in table["fleet"]:
        return make_fleet(table, name)
    if name.endswith(".toml") or "/" in name:
        return read_fleet_file(Path(name))
    try:
        classes = [kind for kind, _ in parse_mix(name, str)]
    except ValueError as error:
        raise UsageError(f"--fleet takes a name, a mix of classes or a TOML file: {error}") from error
    for kind in classes:
        if kind not in table["class"]:
            known = f"(fleets: {', '.join(table['fleet'])}; classes: {', '.join(table['class'])}; or a file.toml)"
            raise UsageError(f"no device class or fleet '{kind}'{nearest(kind, [*table['fleet'], *table['class']])} {known}")
    mixed = {"about": "a mix of classes", "classes": name, "from": "the mix as given"}
    return make_fleet(merge_options(table, {"fleet": {name: mixed}}), name)


def read_fleet_file(path: Path) -> Fleet:
    """The one fleet of a TOML file, whose classes stand beside those of hetfl. Raises UsageError."""
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"fleet file '{path}' cannot be read: {reason(error)}") from error
    sections = {"fleet", "class", "availability", "reference"}
    if odd := sorted(set(given) - sections) or sorted(k for k in given if not isinstance(given[k], dict)):
        raise UsageError(
            f"fleet file '{path}' has '{odd[0]}'{nearest(odd[0], sections)}; it may have {', '.join(sorted(sections))}"
        )
    if len(given.get("fleet", {})) != 1:
        raise UsageError(f"fleet file '{path}' must hold one [fleet.NAME], not {len(given.get('fleet', {}))}")
    return make_fleet(merge_options(read_builtin(), given), next(iter(given["fleet"])), f"fleet file '{path}': ")


def format_fleet(name: str, what: str, step: StepTime, memory: float, watts: float, source: str) -> str:
    """The text of a fleet file of one class, this device."""
    kind = {"what": what, "memory": f"{memory:.0f}", "step": list(astuple(step)), "watts": watts, "from": source}
    fleet = {"about": what, "classes": name, "share": 1.0, "from": f"{source}; network and nJ a bit: hetfl's defaults"}
    return tomli_w.dumps({"fleet": {name: fleet}, "class": {name: kind}})


def make_fleet(table: Mapping[str, Any], name: str, where: str = "") -> Fleet:
    """Fleet `name` of a table as plugins/fleets.toml is. Raises UsageError for the first thing wrong with it."""
    own = table["fleet"][name]
    when = own.get("availability") if isinstance(own, dict) else None
    if when is not None and when not in table["availability"]:
        raise UsageError(f"{where}no availability '{when}'{nearest(str(when), table['availability'])}")
    try:
        kinds = {kind: DeviceClass.model_validate(fields) for kind, fields in table["class"].items()}
        rhythm = Rhythm.model_validate(table["availability"][when]) if when is not None else None
        return Fleet.model_validate({"name": name, **own, "kinds": kinds, "reference": table["reference"], "rhythm": rhythm})
    except (ValidationError, TypeError) as error:
        raise UsageError(f"{where}{explain(error)}") from error


def explain(error: ValidationError | TypeError) -> str:
    """One sentence for the first thing that is wrong."""
    if isinstance(error, TypeError):
        return "every fleet and class is a table"
    first = error.errors()[0]
    place = f"{error.title}.{'.'.join(map(str, first['loc']))}".rstrip(".")
    return f"{place}: {first['msg'].removeprefix('Value error, ').removeprefix('Input ')} (got {first['input']!r:.60})"
