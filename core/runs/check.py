"""Whether the files of a run folder are what the run left there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hetfl.config import read_run_file, resolve
from hetfl.errors import UsageError, foreign
from hetfl.runs.checkpoint import Checkpoints
from hetfl.runs.folder import WEIGHTS, RunFolder, csv_text
from hetfl.runs.runner import CHECKPOINTS


def check_folder(path: Path) -> Iterator[tuple[str, str]]:
    """What there is in a run folder, by its name, with what is wrong with it; "" where nothing is. A damaged part of a checkpoint
    that has a copy is mended, which is said. Raises UsageError where the folder is no run's."""
    folder = RunFolder(path)
    folder.require_run()
    yield "config.toml", config_fault(path)
    for name in ("run.json", "summary.json"):
        if folder.holds(name):
            yield name, json_fault(folder, name)
    store = Checkpoints(path / CHECKPOINTS)
    yield from store.check()
    yield from ((part, "was damaged, and is mended from its copy") for part in store.mended)
    whole = store.load(lambda _: None)
    if whole is not None:
        faults = store.journal.faults(whole.mark)
        yield from ((name, f"{fault}; hfl resume takes its copy, which is whole") for name, fault in faults.items())
        with foreign(f"the journal in '{path}'"):
            rounds = list(whole.rounds)
            tables = {"metrics.csv": [row for row, _ in rounds], "clients.csv": [row for _, people in rounds for row in people]}
            found = [(name, table_fault(folder, name, rows)) for name, rows in tables.items() if rounds]
        yield from found
    if folder.holds("summary.json") and not json_fault(folder, "summary.json"):
        yield WEIGHTS, folder.weights_fault()


def config_fault(path: Path) -> str:
    try:
        resolve(read_run_file(path / "config.toml"))
    except UsageError as error:
        return str(error)
    return ""


def json_fault(folder: RunFolder, name: str) -> str:
    try:
        folder.read(name)
    except UsageError:
        return "is no JSON of a run"
    return ""


def table_fault(folder: RunFolder, name: str, rows: list[dict[str, object]]) -> str:
    """Why a table does not begin with the rows that the last whole checkpoint has; it may have a round more, or columns more."""
    try:
        lines = folder.bytes_of(name).decode().splitlines()
    except (OSError, UnicodeDecodeError):
        return "cannot be read"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    wider = [*columns, *(c for c in lines[0].split(",")[len(columns) :])] if lines else columns
    expected = csv_text(wider, [dict(zip(wider, wider, strict=True)), *rows]).splitlines()
    return "" if lines[: len(expected)] == expected else "does not have the rows of the last checkpoint"
