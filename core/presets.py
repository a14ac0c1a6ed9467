"""Whole experiments by name: every setting of a paper's run that is known, frozen, with a hash."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hetfl.config import merge_options
from hetfl.digest import digest_json
from hetfl.errors import UsageError, nearest
from hetfl.files import find_resource

PATH = find_resource("plugins/presets.toml", "plugins/presets.toml")


@dataclass(frozen=True)
class Preset:
    """The run options of an experiment; `unlike` says what differs from the paper all the same."""

    name: str
    about: str
    unlike: str = ""
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the settings: equal in two runs that began from the same ones."""
        return digest_json(self.values)


@cache
def presets() -> dict[str, Preset]:
    """The experiments by name; those that only others are made from are not among them."""
    table = tomllib.loads(PATH.read_text(encoding="utf-8"))
    bases = {values["like"] for values in table.values() if "like" in values}
    return {name: read_preset(name, resolve_inheritance(table, name)) for name in table if name not in bases and "/" in name}


def resolve_inheritance(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The settings of `name` over those of what it is like, and what it is `also_unlike` behind what that is unlike."""
    own = dict(table[name])
    also = own.pop("also_unlike", "")
    merged = merge_options(resolve_inheritance(table, own.pop("like")), own) if "like" in own else own
    return {**merged, "unlike": "; ".join(filter(None, [merged.get("unlike"), also]))} if also else merged


def assign(settings: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of a tree of settings with `value` at `path`. Raises UsageError where the path leads through a plain value."""
    name, *rest = path
    if not rest:
        return {**settings, name: value}
    below = settings.get(name, {})
    if not isinstance(below, Mapping):
        raise UsageError(f"'{name}' is given twice, as a value and as a table ({'.'.join(path)})")
    return {**settings, name: assign(below, rest, value)}


def read_preset(name: str, values: dict[str, Any]) -> Preset:
    return Preset(name, values.pop("about"), values.pop("unlike", ""), values)


def find_preset(name: str) -> Preset:
    """The preset of that name. Raises UsageError where there is none."""
    if name not in presets():
        raise UsageError(f"unknown preset '{name}'{nearest(name, presets())} (hfl presets lists them)")
    return presets()[name]
