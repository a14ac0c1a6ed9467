"""What is shipped: the wheel holds the package and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest

from helpers.paths import ROOT


@pytest.mark.slow
def test_wheel_holds_exactly_the_package(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("hetfl-*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    sources = {f"hetfl/{p.relative_to(ROOT)}" for folder in ("core", "plugins", "cli") for p in (ROOT / folder).glob("*.py")}
    data = {f"hetfl/{p.relative_to(ROOT)}" for p in [*(ROOT / "core" / "digits").iterdir(), *(ROOT / "plugins").glob("*.toml")]}
    assert names == sources | data | {"hetfl/registry.toml"}


def test_no_python_file_at_the_root():
    assert not list(ROOT.glob("*.py")), "it would ship as a module of hetfl"


def test_readme_commands_stand_alone_on_their_lines():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "pip install -c constraints.txt -e . && hfl run --extract fedconv --aggregate kld" in lines
    assert "pip install -c constraints.txt -e '.[test]' && pytest" in lines
