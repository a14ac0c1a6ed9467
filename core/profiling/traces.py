"""Fleets from traces of others: FedScale's pickles of device capacities and behaviour, or CSV files of the same facts.

Only fitted parameters are kept: how fast devices are relative to each other, lognormal bandwidths, sessions and gaps.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import tomli_w

from hetfl.errors import UsageError
from hetfl.files import reason
from hetfl.profiling.pickles import read_plain_pickle

MIDDLE = 0.15  # TFLOP/s of the median device, as of phone-mid in plugins/fleets.toml
PHONES = {"classes": "phone-low:1,phone-mid:2,phone-high:1", "down": [5.17, 0.47], "up": [3.10, 0.68]}
ASSUMED = "memory, watts, latency and the median device's TFLOP/s assumed as phones"
COLUMNS = ({"computation", "communication"}, {"client", "start", "end"})


@dataclass(eq=False)
class Traces:
    """What traces say: `latencies` of a sample in ms and `bandwidths` in kb/s, one a device; each device's sessions as (start, end)
    in seconds, ascending; `sources` are the files' names."""

    latencies: list[float] = field(default_factory=list)
    bandwidths: list[float] = field(default_factory=list)
    sessions: list[list[tuple[float, float]]] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)


def read_traces(paths: Sequence[Path]) -> Traces:
    """The traces in files, .csv or pickles. Raises UsageError for the first thing that is wrong with one."""
    found = Traces()
    for path in paths:
        found.sources.append(path.name)
        try:
            data = path.read_bytes()
            rows = read_csv(data) if path.suffix == ".csv" else list_entries(read_plain_pickle(data))
            add_rows(found, rows)
        except OSError as error:
            raise UsageError(f"trace '{path}' cannot be read: {reason(error)}") from error
        except UsageError as error:
            raise UsageError(f"trace '{path}': {error}") from error
    return found


def list_entries(value: Any) -> list[tuple[str, Mapping[str, Any]]]:
    """(client, facts) of a pickle as FedScale's: {client: {"computation": …}} or {client: {"active": […], "inactive": […]}}."""
    if not isinstance(value, dict) or not value or not all(isinstance(entry, dict) for entry in value.values()):
        raise UsageError("it is no dict of clients' dicts, as FedScale's traces are")
    return [(str(client), entry) for client, entry in value.items()]


def read_csv(data: bytes) -> list[tuple[str, Mapping[str, Any]]]:
    """(client, facts) of a CSV file: computation (ms a sample) and communication (kb/s), or client, start and end (seconds)."""
    try:
        lines = list(csv.DictReader(io.StringIO(data.decode())))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"it is no CSV file: {error}") from error
    if not lines or not any(columns <= lines[0].keys() for columns in COLUMNS):
        raise UsageError("it needs rows with the columns computation and communication, or client, start and end")
    if "start" not in lines[0]:
        return [(f"line {number}", line) for number, line in enumerate(lines, 2)]
    sessions: dict[str, dict[str, list[Any]]] = {}
    for line in lines:
        mine = sessions.setdefault(str(line["client"]), {"active": [], "inactive": []})
        mine["active"].append(line["start"])
        mine["inactive"].append(line["end"])
    return list(sessions.items())


def add_rows(found: Traces, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Adds what each client's facts say. Raises UsageError for figures that cannot be."""
    for client, facts in rows:
        if {"computation", "communication"} <= facts.keys():
            found.latencies.append(read_number(client, "computation", facts["computation"]))
            found.bandwidths.append(read_number(client, "communication", facts["communication"]))
        elif {"active", "inactive"} <= facts.keys():
            found.sessions.append(read_sessions(client, facts["active"], facts["inactive"]))
        else:
            raise UsageError(f"client {client} has neither computation and communication nor active and inactive")


def read_number(client: str, name: str, value: Any, least: float = 1e-9) -> float:
    """A finite number of at least `least`."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number) or number < least:
        raise UsageError(
            f"{name} of client {client} is {value!s:.30}, where a number {'above' if least else 'of at least'} 0 is needed"
        )
    return number


def read_sessions(client: str, starts: Any, ends: Any) -> list[tuple[float, float]]:
    """A client's sessions, one after the other."""
    if not isinstance(starts, list) or not isinstance(ends, list) or len(starts) != len(ends):
        raise UsageError(f"client {client} does not have as many ends of sessions as begins")
    read = [(read_number(client, "start", s, 0.0), read_number(client, "end", e)) for s, e in zip(starts, ends, strict=True)]
    if any(start >= end for start, end in read) or any(a[1] > b[0] for a, b in pairwise(read)):
        raise UsageError(f"the sessions of client {client} overlap, or end before they begin")
    return read


def format_traces(name: str, traces: Traces) -> str:
    """The text of a fleet file with what `traces` say. Raises UsageError where they say too little."""
    source = f"fitted to {', '.join(traces.sources)}; {ASSUMED}"
    fleet: dict[str, Any] = {"about": f"{name}, imported", "share": 0.25, "latency": [0.05, 0.5], "from": source, **PHONES}
    table: dict[str, Any] = {"fleet": {name: fleet}}
    if traces.latencies:
        classes, fleet["speed"] = fit_classes(traces.latencies)
        mean, sigma = fit_lognormal(traces.bandwidths, "bandwidths")
        fleet["down"] = fleet["up"] = [math.exp(mean) / 1000, sigma]
        fleet["classes"] = ",".join(f"{name}-{kind}:{share}" for kind, (share, _) in classes.items())
        what = {
            kind: f"device of the {words}"
            for kind, words in zip(classes, ("slowest quarter", "middle half", "fastest quarter"), strict=True)
        }
        table["class"] = {
            f"{name}-{kind}": {"what": what[kind], "memory": "4GB", "tflops": MIDDLE * speed, "watts": 3.0, "from": source}
            for kind, (_, speed) in classes.items()
        }
    if traces.sessions:
        lengths = [end - start for each in traces.sessions for start, end in each]
        gaps = [b[0] - a[1] for each in traces.sessions for a, b in pairwise(each) if b[0] > a[1]]
        when = {"session": list(fit_lognormal(lengths, "sessions")), "gap": list(fit_lognormal(gaps, "gaps between sessions"))}
        table["availability"] = {name: {**when, "longest": max(lengths + gaps), "from": source + "; no daily rhythm fitted"}}
        fleet["availability"] = name
    return tomli_w.dumps(table)


def fit_classes(latencies: Sequence[float]) -> tuple[dict[str, tuple[int, float]], float]:
    """Three classes by latency, {name: (share, speed relative to the median)}, and the sigma of log speed within one."""
    ordered, n = sorted(latencies, reverse=True), len(latencies)
    parts = [ordered[: n // 4], ordered[n // 4 : n - n // 4], ordered[n - n // 4 :]]
    if not all(parts):
        raise UsageError(f"{n} devices are too few for a slowest and a fastest quarter: 4 are needed")
    middle, logs = statistics.median(ordered), [[math.log(value) for value in part] for part in parts]
    sigma = math.sqrt(statistics.fmean((x - statistics.fmean(part)) ** 2 for part in logs for x in part))
    speeds = [middle / statistics.median(part) for part in parts]
    return dict(zip(("slow", "mid", "fast"), zip((1, 2, 1), speeds, strict=True), strict=True)), sigma


def fit_lognormal(values: Sequence[float], what: str) -> tuple[float, float]:
    """Mean and standard deviation of the logarithm."""
    if len(values) < 2:
        raise UsageError(f"{len(values)} {what} are too few to fit")
    logs = [math.log(value) for value in values]
    return statistics.fmean(logs), statistics.pstdev(logs)
