"""Files on disk, written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: Path, named: bool = True, private: bool = False) -> Iterator[Path]:
    """Gives the path of a draft to write; when the block ends it is on disk in the place of `path`.

    Where the block or the disk fails, `path` stays as it was and the draft is removed. Several processes may write one path.
    Without `named`, its name in the folder is on disk only after `sync_folder`. `private`: nobody but its owner can read the file,
    at no moment.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        if private:
            draft.touch(mode=0o600)
        yield draft
        with open(draft, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
        if named:
            sync_folder(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_file(path: Path, data: bytes, named: bool = True, private: bool = False) -> None:
    """Writes `data` to `path`, whole or not at all; `private`: for its owner alone. Raises OSError."""
    with replace_file(path, named, private) as draft:
        draft.write_bytes(data)


def append_file(path: Path, length: int, data: bytes) -> None:
    """Adds `data` to a file after its first `length` bytes, and puts it on disk; what lies beyond is cut off. Raises OSError."""
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.truncate(length)
        file.seek(length)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Puts the names in a folder on disk, where the system can: a file's content alone does not survive a power cut."""
    if os.name != "posix":
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def reason(error: BaseException) -> str:
    """What went wrong, in the system's words and without the path."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def find_resource(installed: str, checkout: str) -> Path:
    """A file that comes with hetfl: at `installed` within the package, else at `checkout` within a checkout."""
    package = Path(__file__).resolve().parent
    path = package / installed
    return path if path.exists() else package.parent / checkout
