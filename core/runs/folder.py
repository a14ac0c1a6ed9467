"""The run folder: every file is written whole or not at all, so that what was computed stays readable."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
import shutil
import tempfile
import tomllib
import uuid
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hetfl.errors import RunError, UsageError
from hetfl.files import reason, replace_file, write_file

LOCK, MARK = ".lock", ".hetfl"

WEIGHTS, FILE_HASH = "weights.safetensors", "weights.safetensors sha256"  # the file, and its hash in the summary
BASE_HASH = "base sha256"  # in run.json and the metadata of the weights, of what a run with adapters does not train


class FolderInUseError(UsageError):
    """Another process runs what lies in a folder."""


class RunFolder:
    """One run's folder. Files: config.toml, run.json, metrics.csv, clients.csv, summary.json, weights.safetensors, pictures."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FileLock | None = None
        self._replaced: Path | None = None  # where the run lies that this one is to replace once it has begun
        self._columns: dict[str, list[str]] = {}  # of the tables that `append` began

    def open(self, overwrite: bool = False) -> RunFolder:
        """Makes the folder. Raises UsageError if it holds anything (unless `overwrite`), is in use or cannot be written.

        With `overwrite` a run of hetfl that lies there is moved aside: `commit` deletes it, `discard` and `release` put it back.
        """
        try:
            if self.path.exists() and not self.path.is_dir():
                raise UsageError(f"--out '{self.path}' is a file; name a folder")
            if self.path.is_dir() and any(self.path.iterdir()):
                if not overwrite:
                    raise UsageError(f"the run folder '{self.path}' is not empty; choose another with --out or give --overwrite")
                self._move_aside()
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            self.write(MARK, "A run folder of hetfl: hfl show, hfl resume and --overwrite know it by this file.\n")
            self.write("config.toml", "")
        except (OSError, RunError) as error:
            raise UsageError(
                f"the run folder '{self.path}' cannot be written: {reason(error)}; choose another with --out"
            ) from error
        return self

    def _move_aside(self) -> None:
        """Makes way for a new run. Raises UsageError where the folder is no run of hetfl, in use, or the current folder."""
        target = self.path.resolve()
        if not is_run_folder(target):
            raise UsageError(f"'{self.path}' holds no run of hetfl, so --overwrite does not replace it")
        if strangers := list_strangers(target):
            raise UsageError(
                f"'{self.path}' holds '{strangers[0]}', which no run leaves, so --overwrite does not replace it: move that first"
            )
        if Path.cwd().is_relative_to(target):
            raise UsageError(f"--overwrite cannot replace '{self.path}': it is the current folder")
        self.lock()
        self.release()  # a folder with an open file in it cannot be renamed on Windows
        aside = target.with_name(f".{target.name}.replaced")
        if aside.exists() and not (target / "run.json").exists():
            shutil.rmtree(target)  # a process was killed here before its run began: what it was to replace is still aside
        else:
            shutil.rmtree(aside, ignore_errors=True)
            target.rename(aside)
        target.mkdir()
        self._replaced = aside

    def commit(self) -> None:
        """The new run has begun: the one that it replaces is deleted."""
        if self._replaced is not None:
            shutil.rmtree(self._replaced, ignore_errors=True)
            self._replaced = None

    def lock(self) -> None:
        """Keeps the folder for this process as long as it lives. Raises UsageError where another one has it."""
        self._unlock()
        self._lock = FileLock(self.path / LOCK, timeout=0, thread_local=False)
        try:
            self._lock.acquire()
        except Timeout as error:
            raise FolderInUseError(f"'{self.path}' is being run by another process") from error
        except OSError as error:
            raise UsageError(f"'{self.path / LOCK}' cannot be locked: {reason(error)}") from error

    def release(self) -> None:
        """Lets others have the folder; a run that it was to replace and did not, since it never began, is back in its place."""
        self._unlock()
        if self._replaced is not None:
            shutil.rmtree(self.path.resolve())
            self._replaced.rename(self.path.resolve())
            self._replaced = None

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def write(self, name: str, content: str | bytes) -> None:
        """Writes one file whole. Raises RunError when the disk is full or the folder not writable."""
        target = self.path / name
        try:
            write_file(target, content.encode() if isinstance(content, str) else content)
        except OSError as error:
            raise RunError(f"'{target}' cannot be written: {reason(error)}; what was written before is intact") from error

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes rows as CSV; columns in order of appearance."""
        self.write(name, table_text(rows))

    def restart_tables(self) -> None:
        """The next rows of every table begin it anew."""
        self._columns.clear()

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows to a table, which the first call begins anew; new columns come after the others. Raises RunError."""
        columns = self._columns.get(name)
        wider = list(dict.fromkeys([*(columns or ()), *(key for row in rows for key in row)]))
        try:
            if columns is None:
                write_file(self.path / name, table_text(rows).encode())
            elif len(wider) > len(columns):
                with replace_file(self.path / name) as draft:
                    widen_table(self.path / name, draft, wider, rows)
            else:
                with open(self.path / name, "a", encoding="utf-8", newline="") as file:
                    file.write(csv_text(columns, rows))
        except OSError as error:
            raise RunError(f"'{self.path / name}' cannot be written: {reason(error)}") from error
        self._columns[name] = wider

    def holds(self, name: str) -> bool:
        return (self.path / name).exists()

    def bytes_of(self, name: str) -> bytes:
        """The content of a file. Raises FileNotFoundError where there is none."""
        return (self.path / name).read_bytes()

    def json(self, name: str, value: Any) -> None:
        self.write(name, json.dumps(value, indent=1) + "\n")

    def read(self, name: str) -> Any:
        """A JSON file of this run, an object. Raises UsageError when there is none."""
        try:
            found = json.loads(self.bytes_of(name))
        except FileNotFoundError as error:
            what = "has not ended yet" if self.holds("config.toml") else "is no run folder of hetfl"
            raise UsageError(f"'{self.path}' {what}: it holds no {name}") from error
        except (OSError, ValueError, RecursionError) as error:
            raise UsageError(f"'{self.path / name}' cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise UsageError(f"'{self.path / name}' is not what a run leaves: it holds no object")
        return found

    def rows(self, name: str) -> list[dict[str, str]]:
        """The lines of a table of this run or matrix. Raises UsageError when there is none."""
        try:
            return list(csv.DictReader(io.StringIO(self.bytes_of(name).decode())))
        except (UnicodeDecodeError, csv.Error) as error:
            raise UsageError(f"'{self.path / name}' cannot be read: {error}") from error
        except FileNotFoundError as error:
            raise UsageError(f"'{self.path}' is no run folder or matrix of hetfl: it holds no {name}") from error

    def require_run(self) -> None:
        """Raises UsageError where no run of hetfl began in this folder."""
        if not self.holds("config.toml"):
            raise UsageError(f"'{self.path}' is no run folder of hetfl: it holds no config.toml")

    def settings(self) -> dict[str, Any]:
        """The values of this run's config.toml."""
        return tomllib.loads(self.bytes_of("config.toml").decode())

    def weights_fault(self) -> str:
        """Why the final weights are not those that the summary is of; "" where they are."""
        try:
            data = self.bytes_of(WEIGHTS)
        except OSError as error:
            return f"{WEIGHTS} cannot be read: {reason(error)}"
        return (
            ""
            if hashlib.sha256(data).hexdigest() == self.read("summary.json").get(FILE_HASH)
            else f"{WEIGHTS} is not what the run left"
        )

    def discard(self) -> None:
        """Removes a folder that holds nothing but its config, for a run refused before it began; what it was to replace is back."""
        if self._replaced is None and self.path.is_dir() and {p.name for p in self.path.iterdir()} <= {"config.toml", LOCK, MARK}:
            self._unlock()
            shutil.rmtree(self.path)
        self.release()


class MemoryFolder(RunFolder):
    """A run's files in memory; only what clients in other processes remember is on disk, until `release`."""

    def __init__(self) -> None:
        super().__init__(Path(tempfile.gettempdir()) / f"hetfl-{uuid.uuid4().hex}")  # made only by what needs it
        self._files: dict[str, bytes] = {}
        self._rows: dict[str, list[Mapping[str, Any]]] = {}
        self._remove = weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)

    def write(self, name: str, content: str | bytes) -> None:
        """Keeps one file."""
        self._files[name] = content.encode() if isinstance(content, str) else content

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keeps rows, which are put into columns when they are read."""
        self._rows[name] = [*rows]

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Keeps further rows."""
        self._rows.setdefault(name, []).extend(rows)

    def holds(self, name: str) -> bool:
        return name in self._files or name in self._rows

    def bytes_of(self, name: str) -> bytes:
        if name in self._rows:
            return table_text(self._rows[name]).encode()
        if name not in self._files:
            raise FileNotFoundError(name)
        return self._files[name]

    def files(self) -> dict[str, bytes]:
        """Every file by its name, tables as CSV."""
        return {name: self.bytes_of(name) for name in (*self._files, *self._rows)}

    def release(self) -> None:
        """Removes what lies on disk; the files in memory stay."""
        self._remove()

    def discard(self) -> None:
        """There is nothing to remove."""


def is_run_folder(path: Path) -> bool:
    """Whether hetfl made this folder: it has the mark, or nothing but a lock yet, or a run.json with hetfl's version."""
    if (path / MARK).is_file() or {file.name for file in path.iterdir()} == {LOCK}:
        return True
    try:
        return "hetfl" in json.loads((path / "run.json").read_text(encoding="utf-8"))["versions"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


OWN = re.compile(  # what runs, matrices and their pictures, reports and trackers leave in a run folder
    r"config\.toml|(run|summary|refused|federation|keys)\.json|(partition|metrics|clients)\.csv|weights\.safetensors|traceback\.txt"
    r"|(curves(-seconds|-joules)?|partition)\.(png|svg|pdf)|report\.html|events\.jsonl|checkpoints|memory|app|flower|tensorboard"
    r"|wandb|\.lock|\.hetfl|\..*\.part"
)


def list_strangers(path: Path) -> list[str]:
    """The names in a run folder of what somebody else has put there."""
    return sorted(file.name for file in path.iterdir() if not OWN.fullmatch(file.name))


CONTROL = dict.fromkeys(  # for str.translate: characters of control, that turn the direction of writing, and halves of characters
    n
    for part in (range(9), range(11, 32), range(127, 160), range(0x202A, 0x202F), range(0x2066, 0x206A), range(0xD800, 0xE000))
    for n in part
)


def table_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """`rows` as a CSV table; columns in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return csv_text(columns, [dict(zip(columns, columns, strict=True)), *rows])


def widen_table(old: Path, new: Path, columns: Sequence[str], more: Sequence[Mapping[str, Any]]) -> None:
    """Writes a table with further `columns`, which the lines of the `old` one leave empty, and with `more` rows."""
    with open(old, encoding="utf-8", newline="") as source, open(new, "w", encoding="utf-8", newline="") as file:
        lines, writer = csv.reader(source), csv.writer(file, lineterminator="\n")
        next(lines, None)
        file.write(csv_text(columns, [dict(zip(columns, columns, strict=True))]))
        writer.writerows([*cells, *[""] * (len(columns) - len(cells))] for cells in lines)
        file.write(csv_text(columns, more))


FORMULA = tuple("=+-@\t\n\uff1d\uff0b\uff0d\uff20")  # with which a cell begins that a spreadsheet may compute


def csv_text(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """`rows` as CSV; texts without control characters, and with a ' before what a spreadsheet would take for a formula."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([plain_cell(row.get(c, "")) for c in columns] for row in rows)
    return text.getvalue()


def plain_cell(value: Any) -> Any:
    """A value as a cell."""
    if not isinstance(value, str):
        return value
    clean = value.translate(CONTROL)
    return f"'{clean}" if clean.startswith(FORMULA) else clean
