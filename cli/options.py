"""From the fields of RunOptions to flags, and from flags, run file and preset to the options of a run."""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from hetfl import config, presets, registry
from hetfl.config import DataOptions, RunOptions, ServerOptions, TrainOptions, format_flag
from hetfl.errors import UsageError

# Options that may be given several times or with commas.
LISTS = tuple(name for name, field in RunOptions.model_fields.items() if get_origin(field.annotation) is tuple)

PAIRS = ("set", "model_args")  # options name=value that may be given several times

# What most runs set comes first in the help, under "Options"; then come the panels in this order.
MAIN = ("extract", "aggregate", "dataset", "model", "clients", "levels", "rounds", "seed", "set", "preset", "out", "overwrite")
GROUPS = ((DataOptions, "Data"), (TrainOptions, "Local training"), (ServerOptions, "Server"))
RUNNING = ("workers", "engine", "ray_address", "client_gpus", "wait", "timeout", "on_client_error", "vmap", "device", "precision")
PANELS = ("Plugins and model", *(title for _, title in GROUPS), "Rounds", "Where and how clients run")

# Options that several commands have.
Debug = Annotated[bool, typer.Option("--debug", help="show tracebacks")]

ModelArgs = Annotated[list[str] | None, typer.Option(help="arguments of the model factory, name=value; may be repeated")]

ClientMod = Annotated[list[str] | None, typer.Option(help="a client mod of Flower's, name:number:…; may be repeated")]


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command`, which takes `**given`, one flag for each field of RunOptions that it has no parameter of its own for."""
    hints = {name: hint for name, hint in inspect.get_annotations(command, eval_str=True).items() if name != "given"}
    own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(command).parameters.values() if p.name != "given"]
    names = {p.name for p in own}
    fields = {name: field for name, field in RunOptions.model_fields.items() if name not in names}
    others = sorted((name for name in fields if name not in MAIN), key=lambda name: PANELS.index(panel_of(name)))
    flags = [flag_of(name, fields[name]) for name in (*(n for n in MAIN if n in fields), *others)]
    last = [p.replace(kind=p.KEYWORD_ONLY) for p in own if p.name == "debug"]
    command.__signature__ = inspect.Signature([*(p for p in own if p.name != "debug"), *flags, *last])  # type: ignore[attr-defined]
    command.__annotations__ = {**hints, **{p.name: p.annotation for p in flags}}
    return command


def panel_of(name: str) -> str:
    """The panel of the help that an option outside MAIN stands in."""
    for group, title in GROUPS:
        if name in group.model_fields:
            return title
    if name in RUNNING:
        return PANELS[-1]
    return PANELS[0] if name in ("profile", "select", "wrap", "model_args", "heads") else "Rounds"


def flag_of(name: str, field: FieldInfo) -> inspect.Parameter:
    """The flag of one field; its value stays text, which RunOptions reads, and None means that it was not given."""
    parts = get_args(field.annotation)
    kind = parts[0] if NoneType in parts else field.annotation  # of `int | None`, int
    choices = [str(choice) for choice in get_args(kind)] if get_origin(kind) is Literal else []
    many = name in LISTS or name in PAIRS
    plain: Any = list[str] if many else bool if kind is bool else str
    text = (field.description or "") + (f" ({', '.join(choices)})" if choices else "")
    text += "; a plugin's name or package.module:Class" if name in registry.ROLES else ""
    text += "; may be repeated" if name in PAIRS else "; may be repeated, or given with commas" if many else ""
    text += "" if field.default in (None, (), {}) else f" [default: {field.default}]"
    option = typer.Option(
        None, *((f"{format_flag(name)}/--no-{name.replace('_', '-')}",) if kind is bool else (format_flag(name),)),
        help=text.replace("[", "\\["), metavar=None if kind is bool else type_name(name, kind), show_default=False,
        rich_help_panel=None if name in MAIN else panel_of(name), autocompletion=completion_of(name, choices),
    )  # fmt: skip
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=plain | None)


def type_name(name: str, kind: Any) -> str:
    """What the help shows as the type of an option's value."""
    if get_origin(kind) is Literal:
        return "CHOICE"
    if name in PAIRS:
        return "NAME=VALUE"
    element = get_args(kind)[0] if get_args(kind) else kind
    return {int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(element, "TEXT")


def completion_of(name: str, choices: list[str]) -> Callable[[str], list[str]] | None:
    """What the shell completes an option's value with: its choices, plugins or presets; None: nothing."""
    known: Callable[[], Iterable[str]]
    if name in registry.ROLES:
        known = lambda: (entry.name for entry in registry.entries(name))  # noqa: E731
    elif name == "preset":
        known = presets.presets
    elif choices:
        known = lambda: choices  # noqa: E731
    else:
        return None
    return lambda incomplete: [value for value in known() if value.startswith(incomplete)]


def gather(file: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """The values of a run: the command line's over the run file's over the preset's."""
    values = merge(config.read_run_file(file) if file else {}, {k: v for k, v in given.items() if v not in (None, [])})
    preset = presets.find_preset(str(values["preset"])).values if values.get("preset") is not None else {}
    return config.merge_options(preset, values)


def merge(file: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The run file's values with those of the command line over them."""
    values = {**file, **{name: value for name, value in given.items() if name not in PAIRS}}
    for name in PAIRS:
        if name in given:
            below = file.get(name, {})
            values[name] = parse_pairs(given[name], format_flag(name), below if isinstance(below, dict) else {})
    for name in LISTS:
        if name in given:
            values[name] = [part for item in given[name] for part in item.split(",")]
    return values


def parse_pairs(pairs: Iterable[str], name: str, below: dict[str, Any] | None = None) -> dict[str, Any]:
    """The tree of settings that pairs such as `a.b=3` spell out over `below`: {a: {b: 3}}. Raises UsageError."""
    settings = below or {}
    for pair in pairs:
        path, value = parse_pair(pair, name)
        if value == pair.partition("=")[2] and (second := re.search(r",\s*([A-Za-z_][\w.]*=.*)", pair)):
            two = f"{name} {pair[: second.start()]} {name} {second[1]}"
            raise UsageError(f"{name} takes one name=value and is given once for each: {two} (text goes in double quotes)")
        settings = presets.assign(settings, path, value)
    return settings


def parse_pair(text: str, name: str) -> tuple[list[str], Any]:
    """`a.b=value` as (path, value). Raises UsageError, which names the option `name`."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise UsageError(f"{name} takes name=value, not '{text}'")
    return key.split("."), parse_value(value)


def parse_value(text: str) -> Any:
    """Numbers, true, false and JSON lists and objects as such; anything else is text."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def check(options: RunOptions) -> None:
    """Refuses what can be refused before torch is imported."""
    config.refuse_for_ray(options)
    needy = next((e for e in registry.choose_entries(options) if e.public), None)
    if needy and not options.server_data:
        raise UsageError(f"{needy.role} plugin '{needy.name}' needs public data on the server: --server-data must be above 0")
    if options.levels is not None and options.profile != "levels":
        raise UsageError(f"--levels sets options of the profile plugin 'levels', but --profile is '{options.profile}'")


LIBRARIES = ("timm", "torchvision", "transformers")  # of models, whose names are no modules of anybody's


def refuse_code(options: RunOptions, given: dict[str, Any], allow: str) -> None:
    """A run file is not to have any module imported: only those that the command line names, or allows."""
    allowed = {part.strip() for part in allow.split(",")}
    for field in ("model", *registry.ROLES):
        value = getattr(options, field)
        for name in value if isinstance(value, tuple) else [value]:
            module, colon, _ = (name or "").partition(":")
            named = given.get(field) not in (None, [])
            if colon and not named and module not in LIBRARIES and not {module, module.split(".")[0]} & allowed:
                raise UsageError(
                    f"the run file's {field} '{name}' is code of the module '{module}': allow it with --allow {module}"
                )


def run_path(options: RunOptions) -> Path:
    """The run folder: --out, or a new folder under runs/, named after the time and the pair."""
    if options.out:
        return options.out
    extract, aggregate, *_ = registry.choose_entries(options)
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{extract.name}-{aggregate.name}"
    paths = [Path("runs") / name, *(Path("runs") / f"{name}-{i}" for i in range(2, 100))]
    return next(path for path in paths if not path.exists())
