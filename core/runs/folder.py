"""The run folder: every file is written whole or not at all, so that what was computed stays readable."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hetfl.errors import RunError, UsageError
from hetfl.files import reason, write_file

LOCK = ".lock"


class RunFolder:
    """One run's folder. Files: config.toml, run.json, metrics.csv, clients.csv, summary.json, weights.safetensors, pictures."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: Any = None
        self._tables: dict[str, tuple[list[str], int]] = {}  # columns and number of rows of what was written

    def open(self, overwrite: bool = False) -> RunFolder:
        """Makes the folder. Raises UsageError if it holds anything (unless `overwrite`), is in use or cannot be written."""
        try:
            if self.path.exists() and not self.path.is_dir():
                raise UsageError(f"--out '{self.path}' is a file; name a folder")
            if self.path.is_dir() and any(self.path.iterdir()):
                self._clear(overwrite)
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            self.write("config.toml", "")
        except (OSError, RunError) as error:
            raise UsageError(
                f"the run folder '{self.path}' cannot be written: {reason(error)}; choose another with --out"
            ) from error
        return self

    def _clear(self, overwrite: bool) -> None:
        if not overwrite:
            raise UsageError(f"the run folder '{self.path}' is not empty; choose another with --out or give --overwrite")
        if not (self.path / "config.toml").exists():
            raise UsageError(f"'{self.path}' holds no run of hetfl, so --overwrite does not replace it")
        self.lock()
        shutil.rmtree(self.path)

    def lock(self) -> None:
        """Keeps the folder for this process as long as it lives. Raises UsageError where another one has it."""
        self.release()
        handle = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT)
        self._held = weakref.finalize(self, os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"'{self.path}' is being run by another process") from error

    def release(self) -> None:
        """Lets others have the folder."""
        if self._held is not None:
            self._held()

    def write(self, name: str, content: str | bytes) -> None:
        """Writes one file whole. Raises RunError when the disk is full or the folder not writable."""
        target = self.path / name
        try:
            write_file(target, content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise RunError(f"'{target}' cannot be written: {reason(error)}; what was written before is intact") from error

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows as CSV; columns in order of appearance. Where they only add to what this object wrote, they are appended."""
        columns, count = self._tables.get(name, ([], 0))
        wider = list(dict.fromkeys([*columns, *(key for row in rows[count:] for key in row)]))
        if columns == wider:
            self._append(name, lines(columns, rows[count:]))
        else:
            self.write(name, lines(wider, [dict(zip(wider, wider, strict=True)), *rows]))
        self._tables[name] = wider, len(rows)

    def _append(self, name: str, text: str) -> None:
        try:
            with open(self.path / name, "a", newline="") as file:
                file.write(text)
        except OSError as error:
            raise RunError(f"'{self.path / name}' cannot be written: {reason(error)}") from error

    def json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=1) + "\n")

    def read(self, name: str) -> Any:
        """A JSON file of this run. Raises UsageError when there is none."""
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError as error:
            what = "has not ended yet" if (self.path / "config.toml").exists() else "is no run folder of hetfl"
            raise UsageError(f"'{self.path}' {what}: it holds no {name}") from error
        except (OSError, ValueError) as error:
            raise UsageError(f"'{self.path / name}' cannot be read: {error}") from error

    def discard(self) -> None:
        """Removes a folder that holds nothing but its config: the run was refused before it began."""
        if self.path.is_dir() and {p.name for p in self.path.iterdir()} <= {"config.toml", LOCK}:
            shutil.rmtree(self.path)


def lines(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """`rows` as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([row.get(c, "") for c in columns] for row in rows)
    return text.getvalue()
