"""What the two halves of an exported app agree on."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flwr.clientapp.mod

from hetfl.errors import UsageError, unknown

RUN, OUTLINE, EVENTS = "run.toml", "outline.json", "events.jsonl"
MODS = ("LocalDpMod", "message_size_mod", "arrays_size_mod")  # of Flower's, around training


def begin(half: str) -> Path:
    """The folder of an app by the path of one of its halves, its own modules importable."""
    folder = Path(half).parent
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return folder


def read_mod(mod: str) -> list[Any]:
    """A client mod of Flower, `name` or `name:argument:…`, as its name and numbers. Raises UsageError."""
    name, *arguments = mod.split(":")
    if name not in MODS:
        raise unknown("client mod", name, MODS)
    try:
        return [name, *map(float, arguments)]
    except ValueError as error:
        raise UsageError(f"--client-mod takes a name and numbers such as LocalDpMod:1.0:0.1:8.0:0.00001, not '{mod}'") from error


def make_mods(given: Sequence[Sequence[Any]]) -> list[Any]:
    """The mods of an outline, made."""
    found = [(getattr(flwr.clientapp.mod, name), arguments) for name, *arguments in given]
    return [mod(*arguments) if arguments else mod for mod, arguments in found]
