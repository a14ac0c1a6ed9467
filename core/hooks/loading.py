"""From a run's options to its configured plugins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from hetfl import registry
from hetfl.config import RunOptions, sentence
from hetfl.errors import NotApplicable, UsageError, nearest
from hetfl.hooks.base import Plugin
from hetfl.hooks.manager import PluginManager
from hetfl.registry import ROLES, Entry

ROLE_HOOKS = {"extract": ("extract",), "aggregate": ("aggregate", "fold"), "profile": ("profile",)}  # a wrap's may be any other


def plugin_settings(options: RunOptions, entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """The plugin options given with --set and --levels, by "role.name". Raises UsageError for a name that is not chosen."""
    found: dict[str, dict[str, Any]] = {e.key: {} for e in entries}
    given = dict(options.set)
    if options.levels is not None:
        given = {**given, "levels": {**given.get("levels", {}), "mix": options.levels}}
    for name, values in given.items():
        for key, value in values.items() if isinstance(values, dict) else [(name, values)]:
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
        bearers = [e for e in bearers if key in e.load().model_fields] or bearers
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


def roles_of(kind: type[Plugin]) -> list[str]:
    """The roles whose own hooks a class implements; none for one that only goes around others, as a wrap does."""
    return [role for role, hooks in ROLE_HOOKS.items() if any(hasattr(getattr(kind, hook, None), "hetfl_impl") for hook in hooks)]


def refuse_wrong_role(entry: Entry, kind: type[Plugin]) -> None:
    """A class that implements another role's hook and not its own was given under the wrong option."""
    roles = roles_of(kind)
    if roles and entry.role not in roles:
        raise UsageError(f"'{entry.plugin}' is no {entry.role} plugin: it implements {roles[0]}, so give it with --{roles[0]}")


def configure_plugin(entry: Entry, given: Mapping[str, Any]) -> Plugin:
    """One plugin with its options; of an object that this process was handed a copy, with `given` over the options that it has.

    A copy, so that a plugin that keeps something from round to round begins each run afresh.
    """
    kind, object = entry.load(), entry.local if isinstance(entry.local, Plugin) else None
    refuse_wrong_role(entry, kind)
    if object is not None and not given:
        return object.model_copy(deep=True)
    try:
        made = kind(**{**({} if object is None else object.model_dump()), **given})
    except ValidationError as error:
        raise UsageError(sentence(error, kind, f"{entry.name}.")) from error
    return made if object is None else object.model_copy(update={name: getattr(made, name) for name in given}, deep=True)
