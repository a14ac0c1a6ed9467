"""Plugins that no package brings: classes by `module:Class`, and objects handed to this process."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from helpers.cli import ONE_ROUND, hfl
from helpers.runs import THREE_NODES
from hetfl import Field, Plugin, hookimpl, registry
from hetfl.cli import options as cli_options
from hetfl.config import read_run_file, resolve
from hetfl.engines.flower.client_app import refuse_not_allowed
from hetfl.engines.flower.export import export
from hetfl.engines.modules import find_own_modules
from hetfl.errors import UsageError
from hetfl.hooks import loading
from hetfl.hooks.loading import load_class
from hetfl.runs import sweep

MODULE = '''
"""Plugins of somebody's own."""

import torch

from hetfl import Field, Merged, Plugin, hookimpl, running_mean, unit_count


class Last(Plugin):
    """The last channels."""

    skip: int = Field(0, ge=0, description="channels at the end that are left out")

    @hookimpl
    def extract(self, server, clients, round):
        return [server.select(lambda size, c=c: self.units(size, c.profile.width)) for c in clients]

    def units(self, size, width):
        kept = unit_count(size, width)
        end = max(kept, size - self.skip)
        return torch.arange(end - kept, end)


class Plain(Plugin):
    """The mean."""

    @hookimpl
    def aggregate(self, server, updates, round):
        return Merged(running_mean(server.state, updates))


class Around(Plugin):
    """Nothing around training."""


number = 3
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A current folder with own_plugins.py in it, which nobody has imported."""
    (tmp_path / "own_plugins.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("own_plugins", None)


def test_a_class_by_its_module_runs_with_options_and_again_from_its_config(own, capsys):
    words = ["run", "--extract", "own_plugins:Last", "--set", "Last.skip=2", "--wrap", "own_plugins:Around", *ONE_ROUND]
    assert hfl(capsys, *words, "--out", own / "a")[0] == 0
    config = read_run_file(own / "a" / "config.toml")
    assert (config["extract"], config["aggregate"], config["wrap"]) == ("own_plugins:Last", "overlap", ["own_plugins:Around"])
    assert config["set"]["extract"] == {"Last": {"skip": 2}}
    again = ["run", own / "a" / "config.toml", "--allow", "own_plugins"]
    assert hfl(capsys, *again, "--out", own / "b")[0] == 0
    assert (own / "a" / "weights.safetensors").read_bytes() == (own / "b" / "weights.safetensors").read_bytes()
    assert (
        hfl(capsys, "run", own / "a" / "config.toml", "--set", "extract.Last.skip=0", "--out", own / "c", "--allow", "own_plugins")[
            0
        ]
        == 0
    )
    assert (own / "a" / "weights.safetensors").read_bytes() != (own / "c" / "weights.safetensors").read_bytes()


def test_finding_imports_nothing(own):
    entry = registry.find("extract", "own_plugins:Last")
    assert (entry.name, entry.source, entry.key) == ("Last", "own_plugins", "extract.Last")
    assert "own_plugins" not in sys.modules
    assert load_class(entry).__name__ == "Last"
    assert entry not in registry.entries()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--extract", "own_plugin:Last"], "extract plugin 'Last' of own_plugin cannot be imported: ModuleNotFoundError"),
        (["--extract", "own_plugins:Lost"], "module 'own_plugins' has no extract plugin 'Lost'; did you mean 'Last'?"),
        (["--extract", "own_plugins:number"], "extract plugin 'number' of own_plugins is not a hetfl Plugin class"),
        (["--extract", "own_plugins:Plain"], "'own_plugins:Plain' is no extract plugin: it implements aggregate, so give"),
        (["--wrap", "own_plugins:Last"], "'own_plugins:Last' is no wrap plugin: it implements extract, so give it with --extract"),
        (["--extract", "own_plugins:Last", "--set", "Last.skp=1"], "unknown option 'Last.skp'; did you mean 'skip'?"),
        (["--extract", "own plugins:Last"], "extract plugin 'own plugins:Last' is no package.module:Class"),
        (["--wrap", "own_plugins:Around,other:Around"], "two chosen wrap plugins bear the name 'Around': own_plugins:Around"),
    ],
)  # fmt: skip
def test_what_is_no_plugin_of_that_role_is_said_in_one_sentence(own, capsys, words, said):
    code, _, err = hfl(capsys, "run", *words, *ONE_ROUND, "--out", own / "o")
    assert code == 2
    assert said in err
    assert not (own / "o").exists()


def test_show_finds_the_role_of_a_class(own, capsys):
    code, out, _ = hfl(capsys, "show", "own_plugins:Last")
    assert code == 0
    assert out.startswith("extract Last (own_plugins) The last channels.")
    assert "Last.skip 0 channels at the end" in out
    assert hfl(capsys, "show", "own_plugins:Around")[1].startswith("wrap Around")


@pytest.mark.parametrize("role", ["extract", "aggregate", "profile", "wrap"])
def test_a_node_refuses_a_module_that_it_does_not_allow(own, role):
    name = "own_plugins:Last"
    options = resolve({role: [name] if role == "wrap" else name})
    for allowed in ([], [""], ["Last"], [f"{role}.Last"], ["own_plugin"]):
        with pytest.raises(UsageError, match=rf"this node does not allow the {role} plugin 'Last' of own_plugins"):
            refuse_not_allowed(options, allowed, own)
    for allowed in ("own_plugins", name):
        refuse_not_allowed(options, [allowed], own)
    assert "own_plugins" not in sys.modules


def test_a_module_of_plugins_travels_inside_an_app(own):
    sys.path.insert(0, str(own))
    options = resolve({**THREE_NODES, "extract": "own_plugins:Last", "profile": "levels"})
    assert [path.name for path in (export(options, own / "app") / "hetfl_app").glob("*plugins.py")] == ["own_plugins.py"]
    loading.load_plugins(options)
    assert find_own_modules(options) == [own / "own_plugins.py"], "Ray ships the same"


def test_the_natural_partner_is_decided_in_one_place(own):
    assert registry.partner_of("fedconv") == "kld"
    assert registry.partner_of("own_plugins:Last") == "overlap"
    options = resolve({"extract": "own_plugins:Last"})
    assert [e.name for e in registry.choose_entries(options)] == ["Last", "overlap", "levels", "uniform"]
    assert cli_options.run_path(options).name.endswith("-Last-overlap")
    assert sweep.cross_plugins(["own_plugins:Last"], ["natural"])[0] == ("own_plugins:Last", "overlap")


def test_a_sweep_passes_settings_to_wraps_and_to_classes(own):
    base = {"wrap": ["dp"], "set": {"dp": {"noise": 0.5}, "clip": {"norm": 1.0}, "wrap": {"dp": {"clip": 2.0}}}}
    (trial,) = sweep.plan_trials(base, [("own_plugins:Last", "overlap")], {"Last.skip": [1]}, [0])
    assert trial.options.set == {"dp": {"noise": 0.5}, "wrap": {"dp": {"clip": 2.0}}, "Last": {"skip": 1}}
    assert trial.name.startswith("Last-overlap-")


class Inverted(Plugin):
    """The first half for everyone."""

    shift: int = Field(0, ge=0, description="where it begins")

    @hookimpl
    def extract(self, server, clients, round):
        return [server.select(lambda size: (torch.arange(size // 2 or 1) + self.shift) % size) for _ in clients]


@pytest.fixture
def add():
    """registry.add_local, undone after the test."""
    added = []

    def add_local(role, plugin):
        added.append((role, registry.add_local(role, plugin)))
        return added[-1][1]

    yield add_local
    for role, name in added:
        registry.remove_local(role, name)


def test_an_object_is_found_by_its_name_and_taken_as_it_is(add):
    plugin = Inverted(shift=3)
    name = add("extract", plugin)
    assert name == "Inverted"
    assert name not in {e.name for e in registry.entries()}
    loaded = loading.load_plugins(resolve({"extract": name})).plugins["extract.Inverted"]
    assert (loaded.shift, loaded is plugin) == (3, False), "a copy, so that each run begins afresh"
    other = loading.load_plugins(resolve({"extract": name, "set": {"Inverted": {"shift": 1}}})).plugins["extract.Inverted"]
    assert (other.shift, plugin.shift) == (1, 3)
    with pytest.raises(UsageError, match=r"engine 'processes' runs clients in other processes, .* 'Inverted'"):
        loading.load_plugins(resolve({"extract": name, "engine": "processes"}))
    registry.remove_local("extract", name)
    with pytest.raises(UsageError, match="unknown extract plugin 'Inverted'"):
        registry.find("extract", name)


def test_a_class_is_configured_and_names_do_not_collide(add):
    name = add("extract", Inverted)
    assert loading.load_plugins(resolve({"extract": name, "set": {name: {"shift": 2}}})).plugins[f"extract.{name}"].shift == 2
    assert add("extract", Inverted) == name
    assert add("extract", Inverted(shift=1)) == "Inverted-2"
    assert add("extract", Inverted(shift=1)) == "Inverted-3"
    full = type("full", (Inverted,), {"__doc__": "Bears a built-in's name."})
    assert add("extract", full) == "full-2"
    assert registry.find("extract", "full").source == "built-in"


def test_objects_of_many_threads_have_names_of_their_own(add):
    plugins, names = [Inverted() for _ in range(32)], []
    threads = [threading.Thread(target=lambda p=p: names.append(add("extract", p))) for p in plugins]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(names)) == 32


@pytest.mark.parametrize(("role", "plugin"), [("extract", 3), ("extract", int), ("extractor", Inverted)])
def test_what_is_no_plugin_is_not_taken(role, plugin):
    with pytest.raises(UsageError):
        loading.load_plugins(resolve({"extract": registry.add_local(role, plugin)}))
