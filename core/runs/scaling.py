"""What a round costs the server, by the number of its clients: seconds, memory and bytes of any pair."""

from __future__ import annotations

import csv
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hetfl.config import RunOptions
from hetfl.errors import RunError
from hetfl.runs.folder import RunFolder

Row = dict[str, Any]

SERVER_PHASES = ("extract", "recover", "aggregate", "statistics", "finetune")  # phases of a round that are the server's

DEFAULTS = {"partition": "iid", "own_test": 0.0, "epochs": 1, "rounds": 3, "eval_every": 1_000_000, "control": False}


def measure_sizes(options: RunOptions, counts: Sequence[int], out: Path) -> Iterator[Row]:
    """A row for each number of clients, all of which take part in every round; each is a process of its own."""
    for count in counts:
        mine = options.model_copy(update={"clients": count, "fraction": 1.0})
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                yield pool.submit(measure_rounds, mine, out / f"{count}-clients").result()
            except BrokenProcessPool as error:
                raise RunError(f"the process with {count} clients was killed, most likely for want of memory") from error


def measure_rounds(options: RunOptions, path: Path) -> Row:
    """Runs with one number of clients; medians over the rounds after the first, in seconds and bytes."""
    from hetfl.rounds.reporting import NoCallback
    from hetfl.runs import runner

    folder = RunFolder(path).open(overwrite=True)
    folder.commit()
    runner.run(options.model_copy(update={"checkpoint_every": 0}), folder, NoCallback())
    with (path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))[1:]
    phases = {f"{name} seconds": median(rows, f"seconds {name}") for name in SERVER_PHASES}
    server = sum(phases.values())
    return {
        "clients": options.clients, "server seconds": server, "server ms a client": 1000 * server / options.clients, **phases,
        "client seconds": median(rows, "client seconds"), "bytes down": median(rows, "bytes down"),
        "bytes up": median(rows, "bytes up"), "peak memory": peak_memory(),
    }  # fmt: skip


def median(rows: Sequence[dict[str, str]], name: str) -> float:
    """The median of a column of metrics.csv, 0 where a round has none."""
    return statistics.median(float(row.get(name) or 0) for row in rows)


def peak_memory() -> float:
    """Bytes that this process held at most; not a number where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def growth_exponent(rows: Sequence[Row], name: str) -> float:
    """The exponent b of value ~ clients^b between the first and the last row; not a number with fewer than two."""
    first, last = rows[0], rows[-1]
    if first["clients"] == last["clients"] or not (first[name] > 0 and last[name] > 0):
        return math.nan
    return math.log(last[name] / first[name]) / math.log(last["clients"] / first["clients"])
