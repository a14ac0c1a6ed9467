"""What is shipped: the wheel holds the package and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

import hetfl
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


IN_THE_SOURCE = ("LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff", "CONTRIBUTING.md", "pyproject.toml")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the sdist, and of the wheel that is built from it."""
    place = tmp_path_factory.mktemp("built")
    done = subprocess.run([sys.executable, "-m", "build", "--outdir", str(place), str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return place


@pytest.mark.slow
def test_the_wheel_of_the_sdist_holds_exactly_the_package(built):
    (wheel,) = built.glob("hetfl-*.whl")
    assert wheel.name.startswith(f"hetfl-{hetfl.__version__}-")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == {shipped_as(path) for path in shipped_files()}


@pytest.mark.slow
def test_the_sdist_holds_what_the_package_is_made_of_and_what_is_said_of_it(built):
    (sdist,) = built.glob("hetfl-*.tar.gz")
    with tarfile.open(sdist) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {*IN_THE_SOURCE, *(path.relative_to(ROOT).as_posix() for path in shipped_files())} <= names
    assert not [name for name in names if name.startswith((".git", "runs/", "docs/", "benchmarks/"))]


@pytest.mark.slow
def test_the_installed_wheel_runs_by_itself(built, tmp_path):
    """In an environment that has the wheel and, of what is installed here, the rest but no hetfl."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    (wheel,) = built.glob("hetfl-*.whl")
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, cwd=tmp_path, env=bare, check=True)  # a checkout as the current folder counts as installed
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))

    def hfl(*words):
        command = [str(tmp_path / "venv" / "bin" / "hfl"), *words]
        return subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True, check=True).stdout

    asked = [python, "-c", "import hetfl; print(hetfl.__file__)"]
    where = subprocess.run(asked, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert where.stdout.startswith(str(site))
    assert hfl("--version").startswith(f"hetfl {hetfl.__version__} (contract {hetfl.API}) torch ")
    hfl("run", "--limit", "150", "--clients", "3", "--rounds", "1", "--pretrain-steps", "2", "--no-control", "--out", "r")
    assert (tmp_path / "r" / "summary.json").exists()
    assert "fedconv" in hfl("list-plugins")


def test_no_python_file_at_the_root():
    assert not list(ROOT.glob("*.py")), "it would ship as a module of hetfl"


def test_readme_commands_stand_alone_on_their_lines():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "pip install -c constraints.txt -e . && hfl run --extract fedconv --aggregate kld" in lines
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in lines
