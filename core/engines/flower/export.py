"""An experiment as a small Flower app that `flwr run` takes to any SuperLink: two lines of code for each half, the resolved config
and the outline of the model. hetfl itself is not in it: it is installed on every host."""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import flwr.clientapp.mod
import tomli_w

from hetfl.config import RunOptions, write
from hetfl.engines.flower.client_app import OUTLINE, RUN
from hetfl.errors import UsageError, unknown
from hetfl.rounds import setup
from hetfl.rounds.loop import norm_policy
from hetfl.rounds.reporting import NoCallback
from hetfl.rounds.setup import Setup
from hetfl.submodel import serialization

PACKAGE = "hetfl_app"

MOST = 10 * 1024 * 1024  # bytes, Flower's limit for an app

MODS = ("LocalDpMod", "message_size_mod", "arrays_size_mod")

HALVES = {"server_app": "hetfl.runs.server_app", "client_app": "hetfl.engines.flower.client_app"}

HALF = '''"""The {half} of an experiment of hetfl; run.toml says which."""

from pathlib import Path

from hetfl.engines.flower.manifest import begin
from {module} import {half}

app = {half}(begin(__file__))
'''


def export(options: RunOptions, folder: Path, mods: Sequence[str] = ()) -> Path:
    """Writes the app of a run into `folder`. Raises UsageError where it cannot be written or is too large."""
    common = setup.build_setup(options, NoCallback())
    package = folder / PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    (folder / "LICENSE").write_text("An experiment of whoever exported it; hetfl itself is under the Apache License 2.0.\n")
    (folder / "pyproject.toml").write_text(tomli_w.dumps(project_file(options)))
    (folder / "README.md").write_text(f"An experiment of hetfl: {options.extract} on {options.dataset}. `flwr run . SUPERLINK`\n")
    (package / "__init__.py").write_text("")
    for half, module in HALVES.items():
        (package / f"{half}.py").write_text(HALF.format(half=half, module=module))
    (package / RUN).write_text(write(resolve_open_options(common), common.plugins.options()))
    (package / OUTLINE).write_text(json.dumps(describe_run(common, mods)))
    for name in (options.model, options.extract, options.aggregate, options.profile, *options.wrap):
        copy_module(name, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST:
        raise UsageError(f"the app has {size:,} bytes, more than the {MOST:,} that Flower takes")
    return folder


def resolve_open_options(common: Setup) -> RunOptions:
    """The options with all that is open spelt out, for clients that are each by themselves."""
    options, plugins, federation = common.options, common.plugins, common.federation
    norms = norm_policy(options.norm_policy, plugins.norm_policy, federation.public is not None)
    found = setup.resolve_defaults(options, federation, plugins, norms, "off")
    return found.model_copy(update={"engine": "flower", "out": None})


def describe_run(common: Setup, mods: Sequence[str]) -> dict[str, Any]:
    """What nodes know of the run beside its options; `key` sets its clients' memory apart from that of other runs."""
    widths, named = serialization.to_json(common.builder.widths), list(common.federation.classes)
    return {"key": secrets.token_hex(8), "classes": named, "mods": [parse_mod(m) for m in mods], "widths": widths}


def parse_mod(mod: str) -> list[Any]:
    """A client mod of Flower, `name` or `name:argument:…`, as its name and numbers. Raises UsageError."""
    name, *arguments = mod.split(":")
    if name not in MODS:
        raise unknown("client mod", name, MODS)
    try:
        return [name, *map(float, arguments)]
    except ValueError as error:
        raise UsageError(f"--client-mod takes a name and numbers such as LocalDpMod:1.0:0.1:8.0:0.00001, not '{mod}'") from error


def build_mods(given: Sequence[Sequence[Any]]) -> list[Any]:
    """The mods of an outline, made."""
    found = [(getattr(flwr.clientapp.mod, name), arguments) for name, *arguments in given]
    return [mod(*arguments) if arguments else mod for mod, arguments in found]


def project_file(options: RunOptions) -> dict[str, Any]:
    """The app's pyproject.toml: heavy packages are not among its dependencies, so that nothing is installed anew on a node."""
    components = {"serverapp": f"{PACKAGE}.server_app:app", "clientapp": f"{PACKAGE}.client_app:app"}
    app = {
        "publisher": "hetfl", "fab-format-version": 1, "flwr-version-target": "1.41.0", "components": components,
        "config": {"out": ""},
    }  # fmt: skip
    return {
        "build-system": {"requires": ["hatchling"], "build-backend": "hatchling.build"},
        "project": {
            "name": "hetfl-app", "version": "1.0.0", "description": f"hetfl: {options.extract} on {options.dataset}",
            "license": {"file": "LICENSE"}, "dependencies": ["flwr>=1.41.0"],
        },
        "tool": {"flwr": {"app": app}, "hatch": {"build": {"targets": {"wheel": {"packages": ["."]}}}}},
    }  # fmt: skip


def copy_module(name: str | None, folder: Path) -> None:
    """Copies the module of a user's own model or plugin, `package.module:name`, so that it travels inside the app."""
    module, colon, _ = (name or "").partition(":")
    if not colon or module in ("timm", "torchvision", "transformers"):
        return
    top = module.split(".")[0]
    spec = find_spec(top)
    origin = Path(spec.origin) if spec and spec.origin else None
    if origin is None or Path(sys.prefix) in origin.parents or "site-packages" in origin.parts:
        return  # installed: it is to be installed, and allowed, on the nodes too
    if origin.name == "__init__.py":
        shutil.copytree(origin.parent, folder / PACKAGE / top, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(origin, folder / PACKAGE / origin.name)
