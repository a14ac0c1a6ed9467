"""Which plugins exist: built-ins agree with their classes, strangers' are named when they clash or break."""

from __future__ import annotations

import inspect
import shutil

import pytest

from hetfl import registry
from hetfl.errors import UsageError
from hetfl.hooks.base import Plugin
from hetfl.hooks.loading import load_class


@pytest.mark.parametrize("entry", registry.builtins(), ids=lambda e: f"{e.role}.{e.name}")
def test_the_registry_agrees_with_the_classes(entry):
    strategy = load_class(entry)
    assert issubclass(strategy, Plugin)
    assert strategy.__doc__
    assert strategy.__module__ == entry.plugin.partition(":")[0]
    for flag, tokens in (
        (entry.public, ["server.public"]),
        (entry.memory, ["task.client_state", "note_remaining(task", "Exchange(down="]),
    ):
        source = inspect.getsource(inspect.getmodule(strategy) if flag else strategy)
        source += "".join(inspect.getsource(k) for k in strategy.__mro__[1:] if k.__module__.startswith("hetfl.plugins"))
        found = [t for t in tokens if t in source]
        assert bool(found) == flag
    if entry.role == "extract":
        assert registry.find("aggregate", entry.aggregate)
    assert all(field.description for field in strategy.model_fields.values())


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


def test_what_is_installed_or_removed_meanwhile_is_seen(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def listed():
        return [entry.source for entry in registry.entries("extract") if entry.name == "late"]

    assert listed() == []
    dist(tmp_path, "late", "[hetfl.extract]\nlate = late:Late\n", "")
    assert listed() == ["late 1.0"]
    shutil.rmtree(tmp_path / "late-1.0.dist-info")
    assert listed() == []


def test_a_broken_plugin_fails_only_when_asked_for(tmp_path, monkeypatch):
    dist(tmp_path, "broken", "[hetfl.aggregate]\nbroken = broken:B\nodd = broken_too:B\n", "raise RuntimeError('no licence')")
    (tmp_path / "broken_too.py").write_text("B = 3")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "broken" in {e.name for e in registry.entries("aggregate")}
    with pytest.raises(UsageError, match=r"'broken' of broken 1\.0 cannot be imported: RuntimeError: no licence"):
        load_class(registry.find("aggregate", "broken"))
    with pytest.raises(UsageError, match="not a hetfl Plugin class"):
        load_class(registry.find("aggregate", "odd"))
