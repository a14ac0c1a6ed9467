"""Files on disk, written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Gives the path of a draft to write; when the block ends it is on disk in the place of `path`.

    Where the block or the disk fails, `path` stays as it was and the draft is removed. Several processes may write one path.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield draft
        with open(draft, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_file(path: Path, data: bytes) -> None:
    """Writes `data` to `path`, whole or not at all. Raises OSError."""
    with replace_file(path) as draft:
        draft.write_bytes(data)


def reason(error: BaseException) -> str:
    """What went wrong, in the system's words and without the path."""
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def find_resource(installed: str, checkout: str) -> Path:
    """A file that comes with hetfl: at `installed` within the package, else at `checkout` within a checkout."""
    package = Path(__file__).resolve().parent
    path = package / installed
    return path if path.exists() else package.parent / checkout
