"""From a run's options to its configured plugins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from hetfl import registry
from hetfl.config import RunOptions, explain_validation_error
from hetfl.errors import NotApplicable, UsageError, nearest
from hetfl.hooks.base import Plugin
from hetfl.hooks.manager import PluginManager
from hetfl.registry import ROLES, Entry


def choose_entries(options: RunOptions) -> list[Entry]:
    """The registry entries of a run's plugins, found without importing them."""
    extract = registry.find("extract", options.extract)
    aggregate = registry.find("aggregate", options.aggregate or extract.aggregate or "overlap")
    return [extract, aggregate, registry.find("profile", options.profile), *(registry.find("wrap", w) for w in options.wrap)]


def plugin_settings(options: RunOptions, entries: Sequence[Entry]) -> dict[str, dict[str, Any]]:
    """The plugin options given with --set and --levels, by "role.name". Raises UsageError for a name that is not chosen."""
    found: dict[str, dict[str, Any]] = {f"{e.role}.{e.name}": {} for e in entries}
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
        places = " or ".join(f"{e.role}.{name}.{key}" for e in bearers)
        raise UsageError(f"option '{name}.{key}' could belong to two chosen plugins; say {places}")
    if not bearers:
        names = [e.name for e in entries]
        raise UsageError(
            f"option '{name}.{key}': no chosen plugin is named '{name}'{nearest(name, names)} (chosen: {', '.join(names)})"
        )
    return f"{bearers[0].role}.{name}", {key: value}


def load_plugins(options: RunOptions) -> PluginManager:
    """Imports and configures a run's plugins. Raises UsageError for a bad option or a plugin that cannot be used."""
    entries = choose_entries(options)
    given = plugin_settings(options, entries)
    made = {f"{e.role}.{e.name}": configure_plugin(e, given[f"{e.role}.{e.name}"]) for e in entries}
    refuse_own_models(made, entries)
    return PluginManager(made)


def refuse_own_models(made: Mapping[str, Plugin], entries: Sequence[Entry]) -> None:
    """Architectures that share no coordinates cannot be averaged entry by entry."""
    extract, aggregate = entries[:2]
    if made[f"extract.{extract.name}"].takes_own_models and not made[f"aggregate.{aggregate.name}"].takes_own_models:
        raise NotApplicable(
            f"not applicable: the clients of '{extract.name}' have architectures of their own here, which share no coordinates, "
            f"and '{aggregate.name}' averages parameters; take an aggregation of scores or of clusters"
        )


def configure_plugin(entry: Entry, given: Mapping[str, Any]) -> Plugin:
    """One plugin with its options."""
    strategy = entry.load()
    try:
        return strategy(**given)
    except ValidationError as error:
        raise UsageError(explain_validation_error(error, strategy, f"{entry.name}.")) from error
