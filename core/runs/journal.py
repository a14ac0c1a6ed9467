"""The rows of a run's finished rounds, a line of JSON a round, in two files alike.

Lines are only ever added, so a checkpoint need not hold them: it says how long the journal was, and the SHA-256 of so much of it.
What a kill left half written lies beyond that, and is cut off when the run goes on. Where one file is damaged the other is read.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hetfl.errors import RunError
from hetfl.files import append_file, write_file
from hetfl.rounds.rows import Row

Round = tuple[Row, list[Row]]  # the row of a round, and those of its clients

NAMES = ("rounds.jsonl", "rounds-copy.jsonl")
CHUNK = 1 << 20


@dataclass(frozen=True)
class Mark:
    """The first `length` bytes of a journal, and their hash."""

    length: int = 0
    sha256: str = hashlib.sha256().hexdigest()


class Journal:
    """The journal in `folder`, as far as the mark that `cut` or `add` left; empty until then."""

    def __init__(self, folder: Path) -> None:
        self._paths, self._hash, self._length = [folder / name for name in NAMES], hashlib.sha256(), 0

    def add(self, rounds: Sequence[Round]) -> Mark:
        """Adds rounds; they are on disk when it returns. Raises OSError."""
        lines = b"".join(json.dumps(round).encode() + b"\n" for round in rounds)
        for path in self._paths:
            append_file(path, self._length, lines)
        self._hash.update(lines)
        self._length += len(lines)
        return Mark(self._length, self._hash.hexdigest())

    def cut(self, mark: Mark) -> None:
        """Goes back to `mark`: what lies beyond it is gone, and a file that is damaged is written anew from the other one."""
        whole = self.find(mark)
        for path in self._paths:
            if not mark.length:
                path.unlink(missing_ok=True)
            elif not self._fault(path, mark):
                os.truncate(path, mark.length)
            elif whole is not None:
                write_file(path, whole.read_bytes()[: mark.length])
        self._hash, self._length = hash_prefix(self._paths[0], mark.length), mark.length

    def find(self, mark: Mark) -> Path | None:
        """A file that is whole as far as `mark`; None where neither is."""
        return next((path for path in self._paths if not self._fault(path, mark)), None)

    def faults(self, mark: Mark) -> dict[str, str]:
        """What is wrong with a file, by its name, as far as `mark`."""
        return {path.name: fault for path in self._paths if (fault := self._fault(path, mark))}

    def _fault(self, path: Path, mark: Mark) -> str:
        if not mark.length:
            return ""
        if path.is_symlink():
            return "is a link, through which nothing is written"
        if not path.is_file():
            return "is missing"
        return "" if hash_prefix(path, mark.length).hexdigest() == mark.sha256 else "is not what was written"

    def read(self, mark: Mark) -> Iterator[Round]:
        """The rounds as far as `mark`, one by one. Raises RunError for what is none."""
        path = self.find(mark) if mark.length else None
        if path is None:
            return
        with open(path, "rb") as file:
            while file.tell() < mark.length:
                try:
                    row, people = json.loads(file.readline())
                except (ValueError, TypeError, RecursionError) as error:
                    raise RunError(f"a line of '{path}' is no round of a run") from error
                yield row, people


def hash_prefix(path: Path, length: int) -> hashlib._Hash:
    """The SHA-256 of the first `length` bytes of a file; of fewer where it is shorter or cannot be read."""
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while length > 0 and (data := file.read(min(CHUNK, length))):
                found.update(data)
                length -= len(data)
    except OSError:
        pass
    return found
