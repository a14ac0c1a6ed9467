"""What is shipped: the wheel holds the package and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest

from helpers.paths import ROOT


def shipped_as(path):
    """The place of a file in the wheel: core is the package itself, the others are packages in it."""
    top, *rest = path.relative_to(ROOT).parts
    return "/".join(["hetfl", *({"core": [], "registry.toml": ["index", top]}.get(top, [top])), *rest])


def shipped_files():
    """Every module, and the data that pyproject.toml names."""
    for folder in ("core", "plugins", "cli"):
        yield from (ROOT / folder).rglob("*.py")
    yield from (path for path in (ROOT / "core" / "data" / "digits").iterdir() if path.suffix in (".parquet", ".md"))
    yield from (ROOT / "plugins").rglob("*.toml")
    yield from (ROOT / "core" / "py.typed", ROOT / "cli" / "report.html", ROOT / "registry.toml")


@pytest.mark.slow
def test_wheel_holds_exactly_the_package(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("hetfl-*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == {shipped_as(path) for path in shipped_files()}


def test_no_python_file_at_the_root():
    assert not list(ROOT.glob("*.py")), "it would ship as a module of hetfl"


def test_readme_commands_stand_alone_on_their_lines():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "pip install -c constraints.txt -e . && hfl run --extract fedconv --aggregate kld" in lines
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in lines
