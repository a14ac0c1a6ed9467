"""The docs say what the code is: signatures, generated pages, quoted files, links."""

from __future__ import annotations

import inspect
import re
import runpy

import pytest

import hetfl
from helpers.paths import DOCS, ROOT
from hetfl import registry
from hetfl.hooks import hookspecs
from hetfl.hooks.base import HOOKS
from hetfl.hooks.toolbox import TOOLBOX
from hetfl.models.zoo import ZOO
from hetfl.runs.tables import tables


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_its_heading(name):
    signature = str(inspect.signature(getattr(hookspecs, name))).replace("'", "")
    assert f"## `{name}{signature}`" in (DOCS / "hooks.md").read_text().splitlines()


def test_strategies_page_is_generated():
    assert runpy.run_path(str(DOCS / "strategies.py"))["text"]() == (DOCS / "strategies.md").read_text()


def test_data_page_is_generated():
    assert runpy.run_path(str(DOCS / "datasets.py"))["text"]() == (DOCS / "data.md").read_text()


def test_what_rows_of_published_tables_cost_is_what_they_took_here():
    lines = runpy.run_path(str(DOCS / "reproduction.py"))["read_results"]()
    here = [line for line in lines if line["hardware"] == "2 shared cores"]
    took = {(line["table"], line["row"]): float(line["seconds"]) / 60 for line in here}
    named = {(row.table, row.name): row.minutes for table in tables().values() for row in table.rows if row.minutes is not None}
    assert named == {key: pytest.approx(minutes, abs=0.06) for key, minutes in took.items()}


def test_reproduction_page_is_generated():
    assert runpy.run_path(str(DOCS / "reproduction.py"))["text"]() == (DOCS / "reproduction.md").read_text()


def test_presets_page_is_generated():
    assert runpy.run_path(str(DOCS / "presets.py"))["text"]() == (DOCS / "presets.md").read_text()


@pytest.mark.parametrize(("page", "notes"), [("performance.md", "notes.md"), ("gpu.md", "gpu-notes.md")])
def test_a_measured_page_ends_with_its_notes(page, notes):
    """As benchmarks/compare.py and gpu.py write it: a passage is changed in the notes, and is here the same."""
    assert (DOCS / page).read_text().rstrip().endswith((DOCS / "performance" / notes).read_text().rstrip())


def test_every_model_of_the_zoo_has_its_row():
    page = (DOCS / "models.md").read_text()
    assert all(f"| `{name}` |" in page for name in ZOO)


@pytest.mark.parametrize("entry", registry.builtins(), ids=lambda e: f"{e.role}.{e.name}")
def test_every_plugin_has_its_page_and_stands_in_the_readme(entry):
    assert f"`{entry.name}`" in (ROOT / "README.md").read_text()
    if entry.role in ("extract", "aggregate") and entry.name not in ("fedavg", "overlap"):
        assert f"| [`{entry.name}`](strategies/" in (DOCS / "strategies.md").read_text()


def test_deviations_stand_in_the_docs():
    from hetfl.plugins.aggregations.kld import KLD
    from hetfl.plugins.methods.fedconv.strategy import FedConv

    page = (DOCS / "strategies" / "fedconv.md").read_text()
    for row in (*FedConv.DEVIATES, *KLD.DEVIATES):
        assert "| " + " | ".join(row) + " |" in page


def test_the_tutorial_quotes_the_example():
    text = (DOCS / "tutorial.md").read_text()
    for name in ("hetfl_example.py", "pyproject.toml"):
        assert (DOCS / "example-plugin" / name).read_text() in text


@pytest.mark.parametrize("page", [*sorted(DOCS.rglob("*.md")), ROOT / "README.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_readmes_plugin_selects():
    """The plugin that README shows does what it says."""
    from types import SimpleNamespace

    from hetfl.rng import stream

    (code,) = [c for c in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "class Random" in c]
    space: dict = {}
    exec(compile(code, "README.md", "exec"), space)
    server = SimpleNamespace(stream=lambda *a: stream(0, *a), select=lambda choose: choose(8))
    clients = [SimpleNamespace(id=i, profile=SimpleNamespace(width=0.5)) for i in (0, 1)]
    a, b = space["Random"]().extract(server, clients, 1)
    assert len(a) == len(b) == 4
    assert a.tolist() != b.tolist()
    a, b = space["Random"](shared=True).extract(server, clients, 1)
    assert a.tolist() == b.tolist()


def python_blocks(page):
    """The ```python blocks of a page, as printed."""
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.S | re.M)


def test_the_tutorials_blocks_run_as_printed():
    names = {"__name__": "tutorial"}
    for block in python_blocks("tutorial.md"):
        exec(compile(block, "tutorial.md", "exec"), names)
    assert (
        hetfl.run(extract="full", wrap=[names["Proximal"], names["Labels"]], limit=200, rounds=1, progress=False).clients
        is not None
    )


@pytest.mark.parametrize(
    ("role", "name"),
    [("extract", "Strongest"), ("aggregate", "Momentum"), ("profile", "Flaky"), ("wrap", "Sparse"), ("wrap", "Half")],
)
def test_the_examples_of_hooks_run_as_printed(role, name):
    names = {"__name__": "hooks"}
    for block in python_blocks("hooks.md"):
        exec(compile(block, "hooks.md", "exec"), names)
    values = {"extract": "heterofl", "aggregate": "overlap", role: names[name]}
    run = hetfl.run(**values, limit=200, clients=3, rounds=2, progress=False, control=False)
    assert run.metrics["left out"].tolist() == [0, 0]
    if role == "wrap":
        assert (run.clients["bytes up"] < 0.9 * run.clients["bytes down"]).all()
    if role == "profile":
        assert set(run.clients["level"].astype(str)) <= {"1", "0.5", "1.0"}


def test_the_apis_blocks_run_as_printed():
    names = {"__name__": "api"}
    for block in python_blocks("api.md"):
        exec(compile(block, "api.md", "exec"), names)


@pytest.mark.slow
def test_the_blocks_about_tasks_run_as_printed():
    names = {"__name__": "tasks"}
    for block in python_blocks("tasks.md"):
        exec(compile(block, "tasks.md", "exec"), names)


def test_hooks_md_shows_the_whole_toolbox():
    text = (DOCS / "hooks.md").read_text()
    for module, (names, purpose) in TOOLBOX.items():
        assert f"| `hetfl.{module}` | {', '.join(f'`{n}`' for n in names)} | {purpose} |" in text


def test_every_check_stands_in_its_page():
    from hetfl.testing.checks import CHECKS

    page = (DOCS / "checking.md").read_text()
    for check in CHECKS.values():
        roles = "all" if set(check.roles) == set(registry.ROLES) else ", ".join(check.roles)
        assert re.search(rf"^\| {check.tier.name.lower()} \| `{check.name}` \| .* \| {roles} \|$", page, re.M), check.name
