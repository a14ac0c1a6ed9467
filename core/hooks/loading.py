"""From a run's options to its configured plugins."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from hetfl import registry
from hetfl.config import RunOptions, explain_validation_error
from hetfl.errors import NotApplicable, UsageError, nearest
from hetfl.hooks.base import HOOKS, Plugin
from hetfl.hooks.manager import PluginManager
from hetfl.registry import ROLES, Entry

ROLE_HOOKS = {
    "extract": ("extract",),
    "aggregate": ("aggregate",),
    "profile": ("profile",),
    "select": ("sample",),
}  # a wrap's may be any other


def load_class(entry: Entry) -> type[Plugin]:
    """The plugin's class. Raises UsageError if it cannot be imported or is no Plugin."""
    found = import_class(entry) if entry.local is None else entry.local if isinstance(entry.local, type) else type(entry.local)
    if not (isinstance(found, type) and issubclass(found, Plugin)):
        raise UsageError(f"{entry.role} plugin '{entry.name}' of {entry.source} is not a hetfl Plugin class: {entry.plugin}")
    return found


def import_class(entry: Entry) -> Any:
    """What `module:Class` names; a module that was named by hand is looked up in the current directory too."""
    module, _, attribute = entry.plugin.partition(":")
    if entry.source == module and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise UsageError(f"{entry.role} plugin '{entry.name}' of {entry.source} cannot be imported: {cause}") from error
    if not hasattr(found, attribute):
        raise UsageError(f"module '{module}' has no {entry.role} plugin '{attribute}'{nearest(attribute, dir(found))}")
    return getattr(found, attribute)


def plugin_settings(options: RunOptions, entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """The plugin options given with --set and --levels, by "role.name". Raises UsageError for a name that is not chosen."""
    found: dict[str, dict[str, Any]] = {e.key: {} for e in entries}
    given = dict(options.set)
    if options.levels is not None:
        given = {**given, "levels": {**given.get("levels", {}), "mix": options.levels}}
    for name, values in given.items():
        for key, value in values.items():
            place, option = option_owner(name, key, value, entries)
            found[place].update(option)
    return found


def option_owner(name: str, key: str, value: Any, entries: Sequence[Entry]) -> tuple[str, dict[str, Any]]:
    """Where `name.key = value` belongs; `name` is a plugin's name, or a role and `key` the name."""
    if name in ROLES and isinstance(value, dict):
        if any((e.role, e.name) == (name, key) for e in entries):
            return f"{name}.{key}", value
        name = f"{name}.{key}"
    bearers = [e for e in entries if e.name == name]
    if len(bearers) > 1:
        bearers = [e for e in bearers if key in load_class(e).model_fields] or bearers
    if len(bearers) > 1:
        places = " or ".join(f"{e.key}.{key}" for e in bearers)
        raise UsageError(f"option '{name}.{key}' could belong to two chosen plugins; say {places}")
    if not bearers:
        names = [e.name for e in entries]
        raise UsageError(
            f"option '{name}.{key}': no chosen plugin is named '{name}'{nearest(name, names)} (chosen: {', '.join(names)})"
        )
    return bearers[0].key, {key: value}


def load_plugins(options: RunOptions) -> PluginManager:
    """Imports and configures a run's plugins. Raises UsageError for a bad option or a plugin that cannot be used."""
    entries = registry.choose_entries(options)
    given = plugin_settings(options, entries)
    made = {e.key: configure_plugin(e, given[e.key]) for e in entries}
    refuse_own_models(made, entries)
    return PluginManager(made)


def refuse_own_models(made: Mapping[str, Plugin], entries: Sequence[Entry]) -> None:
    """Architectures that share no coordinates cannot be averaged entry by entry."""
    extract, aggregate = entries[:2]
    if made[extract.key].takes_own_models and not made[aggregate.key].takes_own_models:
        raise NotApplicable(
            f"not applicable: the clients of '{extract.name}' have architectures of their own here, which share no coordinates, "
            f"and '{aggregate.name}' averages parameters; take an aggregation of scores or of clusters"
        )


def refuse_task(plugins: Mapping[str, Plugin], task: str) -> None:
    """Raises NotApplicable where one of `plugins`, by "role.name", is not for tasks of this kind."""
    for key, plugin in plugins.items():
        if plugin.tasks and task not in plugin.tasks:
            role, _, name = key.partition(".")
            meant = " or ".join(plugin.tasks)
            raise NotApplicable(f"not applicable: {role} '{name}' is for --task {meant}, and this is {task}: {plugin.tasks_why}")


def roles_of(kind: type[Plugin]) -> list[str]:
    """The roles whose own hooks a class implements; none for one that only goes around others, as a wrap does."""
    return [role for role, hooks in ROLE_HOOKS.items() if any(hasattr(getattr(kind, hook, None), "hetfl_impl") for hook in hooks)]


def refuse_wrong_role(entry: Entry, kind: type[Plugin]) -> None:
    """A class that implements another role's hook and not its own was given under the wrong option."""
    roles = roles_of(kind)
    if roles and entry.role not in roles:
        raise UsageError(f"'{entry.plugin}' is no {entry.role} plugin: it implements {roles[0]}, so give it with --{roles[0]}")


def refuse_unmarked(entry: Entry, kind: type[Plugin]) -> None:
    """A method that bears a hook's name and is no hook would never be called: the core's default would, under the plugin's name."""
    for hook in HOOKS:
        if callable(method := getattr(kind, hook, None)) and not hasattr(method, "hetfl_impl"):
            has = f"{entry.role} plugin '{entry.name}' has a method '{hook}' that is not marked as a hook"
            raise UsageError(f"{has}: put @hookimpl before it, or rename it")


def configure_plugin(entry: Entry, given: Mapping[str, Any]) -> Plugin:
    """One plugin with its options; of an object that this process was handed a copy, with `given` over the options that it has.

    A copy, so that a plugin that keeps something from round to round begins each run afresh.
    """
    kind, object = load_class(entry), entry.local if isinstance(entry.local, Plugin) else None
    refuse_unmarked(entry, kind)
    refuse_wrong_role(entry, kind)
    if object is not None and not given:
        return object.model_copy(deep=True)
    try:
        made = kind(**{**({} if object is None else object.model_dump()), **given})
    except ValidationError as error:
        raise UsageError(explain_validation_error(error, kind, f"{entry.name}.")) from error
    return made if object is None else object.model_copy(update={name: getattr(made, name) for name in given}, deep=True)
