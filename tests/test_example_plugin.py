"""The example plugin is a real package: installed by pip, listed without an import, paired with built-ins both ways."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hetfl import registry
from hetfl.errors import UsageError

EXAMPLE = Path(__file__).parents[1] / "docs" / "example-plugin"

TINY = ["--limit", "200", "--clients", "3", "--rounds", "1", "--epochs", "1", "--pretrain-steps", "3"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed the example."""
    pytest.importorskip("setuptools", reason="building the example without network needs setuptools")
    place = tmp_path_factory.mktemp("site")
    how = ["-q", "--no-deps", "--no-build-isolation", "--target", str(place)]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *how, str(EXAMPLE)], capture_output=True, text=True)
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
    code = (
        "import sys\nfrom hetfl.cli.main import main\ntry:\n    main(['list-plugins'])\nexcept SystemExit:\n    pass\n"
        "assert 'hetfl_example' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": before_path(site)}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, env=env).returncode == 0


@pytest.mark.parametrize(("extract", "aggregate"), [("alternate", "overlap"), ("fedrolex", "midpoint"), ("alternate", "midpoint")])
def test_it_pairs_with_built_ins(site, tmp_path, extract, aggregate):
    done = hfl(site, "run", "--extract", extract, "--aggregate", aggregate, *TINY, "--out", str(tmp_path / "o"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "weights.safetensors").exists()


def dist(place, name, entry, code):
    info = place / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry)
    (place / f"{name}.py").write_text(code)


def test_two_plugins_of_one_name_are_refused_and_both_named(tmp_path, monkeypatch):
    dist(tmp_path, "rival", "[hetfl.extract]\nheterofl = rival:Rival\n", "")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match=r"built-in \(hetfl.plugins.methods.heterofl:HeteroFL\) and rival 1.0 \(rival:Rival\)"):
        registry.find("extract", "heterofl")


def test_a_broken_plugin_fails_only_when_asked_for(tmp_path, monkeypatch):
    dist(tmp_path, "broken", "[hetfl.aggregate]\nbroken = broken:B\nodd = broken_too:B\n", "raise RuntimeError('no licence')")
    (tmp_path / "broken_too.py").write_text("B = 3")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "broken" in {e.name for e in registry.entries("aggregate")}
    with pytest.raises(UsageError, match=r"'broken' of broken 1\.0 cannot be imported: RuntimeError: no licence"):
        registry.find("aggregate", "broken").load()
    with pytest.raises(UsageError, match="not a hetfl Plugin class"):
        registry.find("aggregate", "odd").load()
