"""The objects that a program gives a run in place of names: models, data, plugins."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from hetfl import registry
from hetfl.config import RunOptions
from hetfl.data import objects
from hetfl.errors import UsageError
from hetfl.hooks.base import Plugin
from hetfl.models import factory

FIELDS = ("model", "dataset", *registry.ROLES)  # the options that may be objects; `wrap` is several

NAMED = {"model": "package.module:factory", "dataset": "a folder or a file (docs/data.md)"}  # what other processes can find

Key = tuple[str, str]  # an option and the name that it has for the object

_users: Counter[Key] = Counter()

_facts: dict[Key, dict[str, Any]] = {}

_ended: list[list[Key]] = []  # of those that lasted no longer, still to be taken out

_lock = threading.Lock()


class Given:
    """Names for objects, which last as long as this lasts: a run holds one, and so does what is made of its result."""

    def __init__(self) -> None:
        self.keys: list[Key] = []
        weakref.finalize(self, forget, self.keys)

    def names(self, values: Mapping[str, Any], recorded: RunOptions | None = None) -> dict[str, Any]:
        """`values` of options with a name in the place of each object; plugins have those of the run whose options are `recorded`.

        Raises UsageError for what is none of the right kind.
        """
        found = dict(values)
        for field in FIELDS:
            value, before = values.get(field), getattr(recorded, field, None)
            if field == "wrap" and value is not None:
                several = value if isinstance(value, list | tuple) else [value]
                found[field] = tuple(
                    self._name(field, *pair) for pair in zip(several, before or [None] * len(several), strict=False)
                )
            elif value is not None:
                found[field] = self._name(field, value, before)
        return found

    def _name(self, field: str, value: Any, recorded: str | None) -> str:
        if isinstance(value, str):
            return value
        if (
            field in registry.ROLES
            and not isinstance(value, Plugin)
            and not (isinstance(value, type) and issubclass(value, Plugin))
        ):
            raise UsageError(f"{field} takes a plugin's name, a Plugin class or an object of one, not {value!r}")
        with _lock:
            add = {"model": factory.add_local, "dataset": objects.add_local}.get(field)
            key = (field, add(value) if add else registry.add_local(field, value, recorded))
            _users[key] += 1
            _facts[key] = describe_object(value)
            self.keys.append(key)
        forget([])
        return key[1]

    def refuse_elsewhere(self, engine: str) -> None:
        """Other processes build a run from its options, which can only name things. Raises UsageError where an object is given."""
        if self.keys and engine != "local":
            field, name = self.keys[0]
            what = option_name(field)
            raise UsageError(
                f"the engine '{engine}' has clients in other processes, which do not have the {what} given as an object, "
                f"'{name}': name {NAMED.get(field, 'package.module:Class')} instead, or take the engine 'local'"
            )


def forget(keys: list[Key]) -> None:
    """Takes out of the registries what no run uses any more; where the collector calls this amid `_name`, `_name` does it then."""
    _ended.append(keys)
    while _ended and _lock.acquire(blocking=False):
        try:
            for key in _ended.pop():
                _users[key] -= 1
                if not _users[key]:
                    del _users[key], _facts[key]
                    remove(*key)
        finally:
            _lock.release()


def remove(field: str, name: str) -> None:
    """Takes one object out of its registry."""
    if field in registry.ROLES:
        registry.remove_local(field, name)
    else:
        (factory if field == "model" else objects).remove_local(name)


def describe_object(value: Any) -> dict[str, Any]:
    """What run.json says of an object."""
    kind: Any = value if hasattr(value, "__qualname__") else type(value)
    more = {"parameters": sum(p.numel() for p in value.parameters())} if isinstance(value, nn.Module) else {}
    return {"class": f"{kind.__module__}.{kind.__qualname__}", **more}


def object_facts(options: RunOptions) -> dict[str, Any]:
    """The objects among the parts of a run, for run.json; nothing where all have names."""
    chosen = [(field, name) for field in FIELDS for name in (options.wrap if field == "wrap" else [getattr(options, field)])]
    found = {option_name(field): _facts[field, name] for field, name in chosen if (field, name) in _facts}
    return {"given as objects": found} if found else {}


def option_name(field: str) -> str:
    return "data" if field == "dataset" else field
