"""`hfl new-plugin`: a folder that installs, and whose tests pass."""

from __future__ import annotations

import keyword
import re
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Annotated, Literal

import typer

from hetfl import registry
from hetfl.cli.console import say
from hetfl.cli.options import Debug
from hetfl.errors import UsageError

TEMPLATES = Path(__file__).with_name("templates")

NAME = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")

PYPROJECT = Template("""[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$name"
version = "0.1.0"
description = "$summary"
requires-python = ">=3.11"
dependencies = ["hetfl"]

[project.optional-dependencies]
test = ["pytest>=8.3"]

[project.entry-points."hetfl.$kind"]
$name = "$module:$cls"

[project.entry-points."hetfl.oracle"]
"$kind.$name" = "$module.oracle:check_by_hand"

[tool.setuptools]
packages = ["$module"]

[tool.pytest.ini_options]
testpaths = ["tests"]
""")

TESTS = Template('''"""What every $kind plugin must do, and the numbers of the paper."""

from $module import $cls
from $module.oracle import check_by_hand

from hetfl.testing import $checks


class Test$cls($checks):
    plugin = $cls()
    oracles = (check_by_hand,)
''')

README = Template("""# $name

$summary

    pip install -e '.[test]'
    pytest
    hfl check $name
    hfl run --$kind $name
""")

Kind = Literal["extract", "aggregate", "profile", "wrap"]


def new_plugin(
    name: Annotated[str, typer.Argument(help="the plugin's name, such as my-method; also the folder's")],
    kind: Annotated[Kind, typer.Option(help="its role")] = "extract",
    out: Annotated[Path | None, typer.Option(help="the folder (default: NAME)")] = None,
    debug: Debug = False,
) -> None:
    """Write a new plugin: a package that installs, with an oracle and tests that pass."""
    folder, module = out or Path(name), name.replace("-", "_")
    refuse(name, module, kind, folder)
    files = write_files(name, module, kind)
    try:
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"'{folder}' cannot be written: {error.strerror}") from error
    for path in files:
        say(f"  {folder / path}")
    say(f"next: pip install -e {folder} && hfl check {name}; the method itself is in {folder / module / '__init__.py'}")


def refuse(name: str, module: str, kind: Kind, folder: Path) -> None:
    """Raises UsageError for a name that cannot be, or is taken, and for a folder that has something in it."""
    if not NAME.fullmatch(name) or keyword.iskeyword(module):
        raise UsageError(f"'{name}' is no name for a plugin: small letters, digits and single hyphens, such as my-method")
    if any(entry.name == name for entry in registry.entries(kind)):
        raise UsageError(f"the role {kind} has a plugin '{name}' already; take another name")
    if find_spec(module) is not None:
        raise UsageError(f"there is a Python module '{module}' already; take another name")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"'{folder}' is not an empty folder; choose another with --out")


def write_files(name: str, module: str, kind: Kind) -> dict[Path, str]:
    """The text of every file of the new plugin by its path in the folder."""
    cls = "".join(part.capitalize() for part in module.split("_"))
    code, oracle = ((TEMPLATES / f"{kind}{end}.py").read_text(encoding="utf-8") for end in ("", "_oracle"))
    summary = re.search(r'class Template\(Plugin\):\n    """(.*?)"""', code, re.S)
    assert summary is not None
    words = {"name": name, "module": module, "kind": kind, "cls": cls, "summary": summary[1]}
    words["checks"] = f"{kind.capitalize()}Checks"
    named = {f"from hetfl.cli.templates.{kind} import": f"from {module} import", "Template": cls}
    for old, new in named.items():
        code, oracle = code.replace(old, new), oracle.replace(old, new)
    return {
        Path("pyproject.toml"): PYPROJECT.substitute(words), Path("README.md"): README.substitute(words),
        Path(module) / "__init__.py": code, Path(module) / "oracle.py": oracle,
        Path("tests") / f"test_{module}.py": TESTS.substitute(words),
    }  # fmt: skip
