"""A cache of decoded data sets and of partitions: one safetensors file for each, written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hetfl.digest import digest_json, digest_tensors
from hetfl.files import replace_file

Stored = tuple[dict[str, Tensor], dict[str, Any]]  # tensors and JSON-able facts

_FORMAT = 3  # raise when what is stored under a key changes


def load_or_make(kind: str, key: Any, make: Callable[[], Stored]) -> Stored:
    """What `make` returns, read from the cache where that has an undamaged file for (kind, key), which is JSON-able.

    The cache is the folder $HETFL_CACHE, else ~/.cache/hetfl. One that cannot be written is done without.
    """
    folder = Path(os.environ.get("HETFL_CACHE") or os.path.expanduser("~/.cache/hetfl"))
    path = folder / f"{kind}-{digest_json([_FORMAT, key])[:32]}.safetensors"
    with contextlib.suppress(OSError, SafetensorError, LookupError, TypeError, ValueError):
        return _read(path)
    stored = make()
    with contextlib.suppress(OSError, SafetensorError):
        _write(path, *stored)
    return stored


def uncached(kind: str, key: Any, make: Callable[[], Stored]) -> Stored:
    """What `make` gives: of data that a program has in memory nothing is written."""
    return make()


def _read(path: Path) -> Stored:
    """Raises ValueError where the file's content is not what was written."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    if facts.pop("checksum") != _checksum(tensors):
        raise ValueError("damaged")
    return tensors, facts


def _write(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as draft:
        save_file(tensors, draft, {"facts": json.dumps(facts | {"checksum": _checksum(tensors)})})


def _checksum(tensors: dict[str, Tensor]) -> str:
    """The digest in the order of the names, for files do not keep the order in which tensors were given."""
    return digest_tensors(dict(sorted(tensors.items())))
