"""Files on disk, written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    draft = path.with_name(f".{path.name}.part")
    try:
        with open(draft, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def reason(error: BaseException) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def shipped(installed: str, checkout: str) -> Path:
    """A file that comes with hetfl: its path within the installed package, or within a checkout."""
    home = Path(__file__).resolve().parent
    within = home / installed
    return within if within.exists() else home.parent / checkout
