"""The example plugin is a real package: installed by pip, listed without an import, paired with built-ins both ways."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.paths import DOCS


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed the example."""
    pytest.importorskip("setuptools", reason="building the example without network needs setuptools")
    place = tmp_path_factory.mktemp("site")
    how = ["-q", "--no-deps", "--no-build-isolation", "--target", str(place), str(DOCS / "example-plugin")]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place


def before_path(site):
    """PYTHONPATH with the folder in front of what is there."""
    return os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])


def hfl(site, *words):
    env = {**os.environ, "PYTHONPATH": before_path(site), "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-m", "hetfl.cli.main", *words], capture_output=True, text=True, env=env)


def test_it_is_listed_without_being_imported(site):
    done = hfl(site, "list-plugins")
    assert "alternate" in done.stdout
    assert "hetfl-example 0.1.0" in done.stdout
    assert "Keeps evenly spaced channels of every layer; at width 0.5, every second one" in done.stdout, "the class's own summary"
    code = (
        "import sys\nfrom hetfl.cli.main import main\ntry:\n    main(['list-plugins'])\nexcept SystemExit:\n    pass\n"
        "assert 'hetfl_example' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": before_path(site)}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, env=env).returncode == 0


TINY = ["--limit", "200", "--clients", "3", "--rounds", "1", "--epochs", "1", "--pretrain-steps", "3"]


@pytest.mark.parametrize(
    ("extract", "aggregate"), [pytest.param("fedrolex", "midpoint", marks=pytest.mark.slow), ("alternate", "midpoint")]
)
def test_it_pairs_with_built_ins(site, tmp_path, extract, aggregate):
    done = hfl(site, "run", "--extract", extract, "--aggregate", aggregate, *TINY, "--out", str(tmp_path / "o"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "weights.safetensors").exists()
