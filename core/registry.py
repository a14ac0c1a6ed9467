"""Which plugins exist: the built-in ones from registry.toml, third parties' from entry points, anyone's by `module:Class`, and what
this process was handed as objects. None is imported to be listed or found."""

from __future__ import annotations

import ast
import os
import sys
import threading
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.machinery import PathFinder
from importlib.metadata import EntryPoint, entry_points
from itertools import accumulate
from pathlib import Path
from typing import Any

from hetfl.config import RunOptions
from hetfl.errors import UsageError, unknown
from hetfl.files import find_resource

ROLES = ("extract", "aggregate", "profile", "select", "wrap")

PATH = find_resource("index/registry.toml", "registry.toml")

BUILT_IN, IN_PROCESS = "built-in", "this process"  # sources beside distributions and modules


@dataclass(frozen=True)
class Entry:
    """One plugin in one role, as known without importing it.

    `source` is "built-in", the distribution that brings it ("name version"), the module of a `module:Class`, or "this process" for
    what was handed in as `local`, a class or a configured object. `adapter`, `blocks`: it is for models with adapters, or with
    residual blocks. `oracle`: the repository's test that holds it to its paper.
    """

    role: str
    name: str
    plugin: str
    source: str = BUILT_IN
    summary: str = ""
    paper: str = ""
    aggregate: str = ""
    granularity: str = ""
    public: bool = False
    memory: bool = False
    adapter: bool = False
    blocks: bool = False
    control: bool = False
    oracle: str = ""
    local: Any = None

    @property
    def key(self) -> str:
        """`role.name`, under which a run has the plugin."""
        return f"{self.role}.{self.name}"

    @property
    def any_model(self) -> bool:
        """Whether it is for models of every kind."""
        return not (self.adapter or self.blocks)

    @property
    def grants(self) -> set[str]:
        """What the owner of a node may write to allow this plugin; a class by its module is not allowed by its bare name."""
        module = self.plugin.partition(":")[0]
        if self.source == module:
            return {self.plugin, module, module.split(".")[0]}
        return {self.name, self.key, self.source.split()[0]}


@cache
def builtins() -> tuple[Entry, ...]:
    """The plugins of registry.toml."""
    table = tomllib.loads(PATH.read_text(encoding="utf-8"))
    return tuple(Entry(role, name, **fields) for role in ROLES for name, fields in table.get(role, {}).items())


def third_party() -> tuple[Entry, ...]:
    """The plugins of installed distributions (entry-point groups hetfl.extract, hetfl.aggregate, …); read again once a folder of
    the path has changed, as it does where something is installed or removed."""
    changed = list[tuple[str, int]]()
    for place in map(os.path.abspath, sys.path):
        with suppress(OSError):
            changed.append((place, os.stat(place).st_mtime_ns))
    return read_installed(tuple(changed))


@lru_cache(maxsize=1)
def read_installed(path: tuple[tuple[str, int], ...]) -> tuple[Entry, ...]:
    """The plugins of what is installed on `path`, which is sys.path and when its folders changed: it reads all distributions."""
    found = entry_points()
    points = [(role, point) for role in ROLES for point in found.select(group=f"hetfl.{role}")]
    return tuple(dict.fromkeys(read_entry_point(role, point) for role, point in points))


def read_entry_point(role: str, point: EntryPoint) -> Entry:
    """One entry point; a distribution that is found twice on the path gives equal entries."""
    source = f"{point.dist.name} {point.dist.version}" if point.dist else "an unknown distribution"
    about = str(point.dist.metadata["Summary"] or "") if point.dist and "Summary" in point.dist.metadata else ""
    module, _, name = point.value.partition(":")
    summary = read_docstring(module, name) or about
    return Entry(role, point.name, point.value, source, summary)


def read_docstring(module: str, name: str) -> str:
    """The first line of a class's docstring, read from the module's source without importing it; nothing where it is not there."""
    places: Any = None
    try:
        for part in accumulate(module.split("."), "{}.{}".format):
            spec = PathFinder.find_spec(part, places)
            places = spec.submodule_search_locations if spec else None
        source = Path(str(spec.origin)).read_text(encoding="utf-8") if spec else ""
        found = next((n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name), None)
    except (OSError, SyntaxError, ValueError):
        return ""
    lines = (ast.get_docstring(found) or "").splitlines() if found else []
    return lines[0].rstrip(".") if lines else ""


def entries(role: str | None = None) -> list[Entry]:
    """All plugins that are listed, or those of one role, built-in ones first."""
    return [e for e in [*builtins(), *third_party()] if role in (None, e.role)]


def find(role: str, name: str) -> Entry:
    """The one plugin of that role: by its name, or any Plugin class by `package.module:Class` (looked up in the current directory
    too), whose name is then the class's. Raises UsageError if there is none or more than one."""
    with _lock:
        if (given := _local.get((role, name))) is not None:
            return given
    if ":" in name:
        module, _, attribute = name.partition(":")
        if not (attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))):
            raise UsageError(f"{role} plugin '{name}' is no package.module:Class")
        return Entry(role, attribute, name, module)
    same = [e for e in entries(role) if e.name == name]
    if not same:
        raise unknown(f"{role} plugin", name, {*(e.name for e in entries(role)), "package.module:Class"})
    if len(same) > 1:
        places = " and ".join(f"{e.source} ({e.plugin})" for e in same)
        raise UsageError(f"two {role} plugins bear the name '{name}': {places}; uninstall one of them")
    return same[0]


def partner_of(extract: str) -> str:
    """The aggregation that goes with an extraction where none is asked for: the one of its paper, or overlap."""
    return find("extract", extract).aggregate or "overlap"


def choose_entries(options: RunOptions) -> list[Entry]:
    """The registry entries of a run's plugins, found without importing them: extraction, aggregation, profile, selection, wraps.

    Raises UsageError for two different plugins of one role and name, and for an object that the engine's processes cannot get.
    """
    found = [
        find("extract", options.extract),
        find("aggregate", options.aggregate or partner_of(options.extract)),
        find("profile", options.profile),
        find("select", options.select),
        *(find("wrap", name) for name in options.wrap),
    ]
    for i, entry in enumerate(found):
        if other := next((e for e in found[:i] if e.key == entry.key and (e.plugin, e.local) != (entry.plugin, entry.local)), None):
            raise UsageError(f"two chosen {entry.role} plugins bear the name '{entry.name}': {other.plugin} and {entry.plugin}")
        if entry.local is not None and options.engine != "local":
            raise UsageError(
                f"the engine '{options.engine}' runs clients in other processes, which do not have the {entry.role} plugin "
                f"'{entry.name}' of this one: give it as package.module:Class, or take the engine 'local'"
            )
    return found


_local: dict[tuple[str, str], Entry] = {}

_lock = threading.RLock()  # the collector may forget one plugin in the thread that is looking up another


def add_local(role: str, plugin: Any, name: str | None = None) -> str:
    """The name by which `find` gives this class or configured object, in this process until `remove_local`; it is not listed.

    It is the class's name, with a number behind it where another plugin of the role has it; or `name`, which a run has recorded for
    it, and which no other object then has any more. In the run the plugin is called by its class either way, as one given as
    package.module:Class is. What is no plugin is refused when a run loads it.
    """
    kind = plugin if isinstance(plugin, type) else type(plugin)
    if role not in ROLES:
        raise unknown("role", role, ROLES)
    listed = {e.name for e in entries(role)}
    if name in listed:
        raise UsageError(f"the {role} plugin '{name}' is no object but one that is listed: leave it out")
    with _lock:
        if name is None:
            had = {known: entry.local for (known_role, known), entry in list(_local.items()) if known_role == role}
            names = (kind.__name__ if i == 1 else f"{kind.__name__}-{i}" for i in range(1, len(listed) + len(had) + 2))
            name = next((known for known, one in had.items() if one is plugin), None) or next(
                n for n in names if n not in listed and n not in had
            )
        _local[role, name] = Entry(role, kind.__name__, f"{kind.__module__}:{kind.__qualname__}", IN_PROCESS, local=plugin)
        return name


def remove_local(role: str, name: str) -> None:
    """Forgets what `add_local` named."""
    with _lock:
        _local.pop((role, name), None)
