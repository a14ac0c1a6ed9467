"""Which plugins exist: the built-in ones from registry.toml, third parties' from entry points; none is imported to be listed."""

from __future__ import annotations

import importlib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from hetfl.errors import UsageError, unknown
from hetfl.files import find_resource

if TYPE_CHECKING:
    from hetfl.hooks.base import Plugin

ROLES = ("extract", "aggregate", "profile", "wrap")

PATH = find_resource("index/registry.toml", "registry.toml")


@dataclass(frozen=True)
class Entry:
    """One plugin in one role, as known without importing it; `source` is "built-in" or the distribution that brings it."""

    role: str
    name: str
    plugin: str
    source: str = "built-in"
    summary: str = ""
    paper: str = ""
    aggregate: str = ""
    granularity: str = ""
    public: bool = False
    memory: bool = False
    control: bool = False

    def load(self) -> type[Plugin]:
        """The plugin's class. Raises UsageError if it cannot be imported or is no Plugin."""
        module, _, attribute = self.plugin.partition(":")
        try:
            found: Any = getattr(importlib.import_module(module), attribute)
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            raise UsageError(f"{self.role} plugin '{self.name}' of {self.source} cannot be imported: {cause}") from error
        from hetfl.hooks.base import Plugin

        if not (isinstance(found, type) and issubclass(found, Plugin)):
            raise UsageError(f"{self.role} plugin '{self.name}' of {self.source} is not a hetfl Plugin class: {self.plugin}")
        return found


@cache
def builtins() -> tuple[Entry, ...]:
    """The plugins of registry.toml."""
    table = tomllib.loads(PATH.read_text())
    return tuple(Entry(role, name, **fields) for role in ROLES for name, fields in table.get(role, {}).items())


def third_party() -> list[Entry]:
    """The plugins of installed distributions (entry-point groups hetfl.extract, hetfl.aggregate, …)."""
    found = [(role, point) for role in ROLES for point in entry_points(group=f"hetfl.{role}")]
    return list(dict.fromkeys(outside(role, point) for role, point in found))


def outside(role: str, point: EntryPoint) -> Entry:
    """One entry point; a distribution that is found twice on the path gives equal entries."""
    source = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
    summary = str(point.dist.metadata["Summary"] or "") if point.dist and "Summary" in point.dist.metadata else ""
    return Entry(role, point.name, point.value, source, summary)


def entries(role: str | None = None) -> list[Entry]:
    """All plugins, or those of one role, built-in ones first."""
    return [e for e in [*builtins(), *third_party()] if role in (None, e.role)]


def find(role: str, name: str) -> Entry:
    """The one plugin of that name and role. Raises UsageError if there is none or more than one."""
    same = [e for e in entries(role) if e.name == name]
    if not same:
        raise unknown(f"{role} plugin", name, {e.name for e in entries(role)})
    if len(same) > 1:
        places = " and ".join(f"{e.source} ({e.plugin})" for e in same)
        raise UsageError(f"two {role} plugins bear the name '{name}': {places}; uninstall one of them")
    return same[0]
