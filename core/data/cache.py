"""What was decoded or dealt once: one safetensors file for each, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

Stored = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and JSON-able facts

_FORMAT = 2  # raise when what is stored under a key changes


def cached(kind: str, key: Any, make: Callable[[], Stored]) -> Stored:
    """What `make` gives, read back from the cache where an undamaged file is kept there under (kind, key)."""
    folder = Path(os.environ.get("HETFL_CACHE") or os.path.expanduser("~/.cache/hetfl"))
    name = hashlib.blake2b(json.dumps([_FORMAT, key]).encode(), digest_size=16).hexdigest()
    path = folder / f"{kind}-{name}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, LookupError, TypeError, ValueError):
        return _read(path)
    stored = make()
    with contextlib.suppress(OSError, SafetensorError):  # goes on without a cache
        _write(path, *stored)
    return stored


def uncached(kind: str, key: Any, make: Callable[[], Stored]) -> Stored:
    """What `make` gives: of data that a program has in memory nothing is written."""
    return make()


def _read(path: Path) -> Stored:
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if facts.pop("checksum") != _checksum(tensors):
        raise ValueError("damaged")
    return tensors, facts


def _write(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{uuid.uuid4().hex}.tmp")
    try:
        save_file(tensors, part, {"facts": json.dumps(facts | {"checksum": _checksum(tensors)})})
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _checksum(tensors: dict[str, Tensor]) -> int:
    value = 0
    for name in sorted(tensors):
        value = zlib.crc32(tensors[name].numpy().data, zlib.crc32(name.encode(), value))
    return value
