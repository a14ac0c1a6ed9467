"""Many runs as one experiment: every pair, every value, every seed."""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from hetfl import config, registry
from hetfl.errors import NotApplicable, RunError, UsageError, unknown
from hetfl.runs.cell import IDLE, Trial, TrialResult, natural, row
from hetfl.runs.folder import RunFolder

FIXED = {"extract", "aggregate", "seed", *IDLE}  # and those that a matrix has options of its own for


def pairs(extract: Sequence[str], aggregate: Sequence[str]) -> list[tuple[str, str]]:
    """The cross product, `all` and `natural` spelt out, with the controls behind it."""
    known = registry.entries("extract")
    names = [e.name for e in known if not e.control] if list(extract) == ["all"] else list(extract)
    partners = [e.name for e in registry.entries("aggregate")] if list(aggregate) == ["all"] else list(aggregate)
    found = [(e, natural(e) if a == "natural" else registry.find("aggregate", a).name) for e in names for a in partners]
    return list(dict.fromkeys([*found, *((e.name, natural(e.name)) for e in known if e.control)]))


def cells(
    base: Mapping[str, Any], pairs: Sequence[tuple[str, str]], sweep: Mapping[str, Sequence[Any]], seeds: Sequence[int]
) -> list[Trial]:
    """Every pair at every point of the sweep with every seed. Raises UsageError for options that no run could have."""
    found = []
    for (extract, aggregate), values in itertools.product(pairs, itertools.product(*sweep.values())):
        point = tuple(zip(sweep, values, strict=True))
        for seed in seeds:
            options = {**base, "extract": extract, "aggregate": aggregate, "seed": seed}
            for name, value in point:
                put(options, name, value)
            options["set"] = relevant(options.get("set", {}), extract, aggregate, str(base.get("profile", "levels")))
            found.append(Trial(point, config.resolve({k: v for k, v in options.items() if v is not None})))
    return found


def put(options: dict[str, Any], name: str, value: Any) -> None:
    """Sets a swept option: one of the run (also as data.public, train.lr …), or plugin.option."""
    group, _, rest = name.partition(".")
    plain = {"public": "server_data"}.get(rest, rest) if group in ("data", "train", "server", "run") else name.replace("-", "_")
    if plain in FIXED:
        raise UsageError(f"'{plain}' is not swept: it has its own option, or changes no result")
    if "." not in plain:
        config.check_option(plain)
        options[plain] = value
        return
    for part in reversed(name.split(".")):
        value = {part: value}
    options["set"] = config.merge_options(options.get("set", {}), value)


def relevant(given: Mapping[str, Any], extract: str, aggregate: str, profile: str) -> dict[str, Any]:
    """Of the plugin options given for the whole matrix those that this pair has a plugin for."""
    chosen = {"extract": extract, "aggregate": aggregate, "profile": profile}
    known = {e.name for e in registry.entries()}
    for name in given:
        if name not in known and name not in chosen:
            raise unknown("plugin", name, known)
    kept: dict[str, Any] = {name: values for name, values in given.items() if name in chosen.values()}
    for role in chosen.keys() & given.keys():
        kept[role] = {name: values for name, values in given[role].items() if name == chosen[role] or name not in known}
    return {name: values for name, values in kept.items() if values != {}}


def refuse_bad(cells: Sequence[Trial]) -> None:
    """What every cell would be refused for is refused at once: an unknown data set, a bad plugin option."""
    from hetfl.data import catalog
    from hetfl.hooks.loading import load_plugins

    for dataset in dict.fromkeys(cell.options.dataset for cell in cells):
        catalog.find_dataset(dataset)
    for cell in {(cell.extract, cell.aggregate, cell.point): cell for cell in cells}.values():
        with suppress(NotApplicable):
            load_plugins(cell.options)


def run(cells: Sequence[Trial], out: Path, jobs: int) -> Iterator[TrialResult]:
    """Runs what is not yet in `out` or failed, `jobs` processes at a time; yields every cell's outcome as it is known."""
    waiting: dict[str, list[Trial]] = {}  # a swept option that a pair does not have leaves it one run for several cells
    for cell in cells:
        known = stored(out, cell)
        if known is None or known.status == "failed":
            waiting.setdefault(cell.name, []).append(cell)
        else:
            yield known
    if not waiting:
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        futures: dict[Future[None], list[Trial]] = {pool.submit(one, same[0], out, jobs): same for same in waiting.values()}
        try:
            for future in as_completed(futures):
                future.result()
                for cell in futures[future]:
                    outcome = stored(out, cell)
                    assert outcome is not None
                    yield replace(outcome, cached=False)
        finally:
            pool.shutdown(cancel_futures=True)


def one(cell: Trial, out: Path, jobs: int) -> None:
    """One cell, in a process of its own; its folder holds a summary, or why there is none."""
    from hetfl.parallel import cores
    from hetfl.rounds.reporting import NoCallback
    from hetfl.runs import runner

    folder = RunFolder(out / "cells" / cell.name).open(overwrite=True)
    workers = max(1, cores() // jobs)
    try:
        runner.run(cell.options.model_copy(update={"workers": workers, "checkpoint_every": 0}), folder, NoCallback())
    except NotApplicable as error:
        folder.json("refused.json", {"status": "not applicable", "why": str(error).removeprefix("not applicable: ")})
    except Exception as error:
        told = str(error) if isinstance(error, RunError | UsageError) else f"{type(error).__name__}: {error}"
        folder.write("traceback.txt", traceback.format_exc())
        folder.json("refused.json", {"status": "failed", "why": told})


def stored(out: Path, cell: Trial) -> TrialResult | None:
    """What `out` holds of a cell."""
    folder = RunFolder(out / "cells" / cell.name)
    for name in ("summary.json", "refused.json"):
        if (folder.path / name).exists():
            found = folder.read(name)
            return TrialResult(cell, found.get("status", "ok"), row(cell, found), cached=True)
    return None
