"""An experiment as a small Flower app that `flwr run` takes to any SuperLink: two lines of code for each half, the resolved config
and the outline of the model. hetfl itself is not in it: it is installed on every host."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from hetfl.config import RunOptions, format_run_file
from hetfl.engines.flower.manifest import OUTLINE, RUN, read_mod
from hetfl.engines.modules import find_own_modules
from hetfl.errors import UsageError
from hetfl.rounds import setup
from hetfl.rounds.clock import choose_fleet
from hetfl.rounds.reporting import NoCallback
from hetfl.rounds.setup import Setup
from hetfl.submodel import serialization

PACKAGE = "hetfl_app"

MOST = 10 * 1024 * 1024  # bytes, Flower's limit for an app

HALVES = {"server_app": "hetfl.runs.server_app", "client_app": "hetfl.engines.flower.client_app"}

HALF = '''"""The {half} of an experiment of hetfl; run.toml says which."""

from pathlib import Path

from hetfl.engines.flower.manifest import begin
from {module} import {half}

app = {half}(begin(__file__))
'''


def export(options: RunOptions, folder: Path, mods: Sequence[str] = ()) -> Path:
    """Writes the app of a run into `folder`. Raises UsageError where it cannot be written or is too large."""
    choose_fleet(options.model_copy(update={"engine": "flower"}))
    common = setup.build_setup(options, NoCallback())
    options = common.options.model_copy(update={"vmap": "off", "engine": "flower", "out": None})
    modules, package = choose_modules(options), folder / PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    (folder / "LICENSE").write_text("An experiment of whoever exported it; hetfl itself is under the Apache License 2.0.\n")
    (folder / "pyproject.toml").write_text(tomli_w.dumps(project_file(options)))
    (folder / "README.md").write_text(f"An experiment of hetfl: {options.extract} on {options.dataset}. `flwr run . SUPERLINK`\n")
    (package / "__init__.py").write_text("")
    for half, module in HALVES.items():
        (package / f"{half}.py").write_text(HALF.format(half=half, module=module))
    (package / RUN).write_text(format_run_file(options, common.plugins.options()))
    (package / OUTLINE).write_text(json.dumps(describe_run(common, mods)))
    for path in modules:
        copy_module(path, package)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if size > MOST:
        raise UsageError(f"the app has {size:,} bytes, more than the {MOST:,} that Flower takes")
    return folder


def describe_run(common: Setup, mods: Sequence[str]) -> dict[str, Any]:
    """What nodes know of the run beside its options; `key` sets its clients' memory apart from that of other runs."""
    widths, named = serialization.to_json(common.builder.widths), list(common.federation.classes)
    found = {"key": secrets.token_hex(8), "classes": named, "mods": [read_mod(m) for m in mods], "widths": widths}
    return found | {"base": common.builder.base_hash}


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


def choose_modules(options: RunOptions) -> list[Path]:
    """The user's own modules that the app takes along. Raises UsageError for one that would take the place of a half."""
    modules = find_own_modules(options)
    for path in (path for path in modules if path.stem in HALVES):
        raise UsageError(f"'{path}' is named as a file of the app itself ({', '.join(HALVES)}): give it another name")
    return modules


def copy_module(path: Path, package: Path) -> None:
    """Copies the file or folder of a module into the app's package, whose folder is on the path of both halves."""
    if path.is_dir():
        shutil.copytree(path, package / path.name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(path, package / path.name)
