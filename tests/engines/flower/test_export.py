"""Strategies as Flower apps."""

from __future__ import annotations

import pytest

from helpers.runs import THREE_NODES
from hetfl.config import read_run_file, resolve
from hetfl.engines.flower.client_app import is_allowed, refuse_not_allowed
from hetfl.engines.flower.export import export
from hetfl.errors import UsageError


def test_an_exported_app_is_small_and_holds_no_package(tmp_path):
    folder = export(resolve({**THREE_NODES, "extract": "fedconv"}), tmp_path / "app")
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 100_000
    project = read_run_file(folder / "pyproject.toml")
    assert project["project"]["dependencies"] == ["flwr>=1.41.0"]
    assert read_run_file(folder / "hetfl_app" / "run.toml")["aggregate"] == "kld"
    for half in ("server_app", "client_app"):
        assert len((folder / "hetfl_app" / f"{half}.py").read_text().splitlines()) < 10


def test_a_users_own_model_travels_inside_the_app(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mylayers.py").write_text("from torch import nn\n\nAct = nn.ReLU\n")
    (tmp_path / "mynet.py").write_text(
        "from mylayers import Act\nfrom torch import nn\n\n\ndef make(classes, channels, size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 8), Act(), nn.Linear(8, classes))\n"
    )
    folder = export(resolve({**THREE_NODES, "extract": "heterofl", "model": "mynet:make"}), tmp_path / "app")
    assert {"mynet.py", "mylayers.py"} <= {path.name for path in (folder / "hetfl_app").iterdir()}, (
        "with what it imports from beside"
    )
    assert is_allowed("mynet:make", [], folder / "hetfl_app")
    (folder / "hetfl_app" / "mypackage").mkdir()
    assert not is_allowed("mypackage:make", [], folder / "hetfl_app")
    (folder / "hetfl_app" / "mypackage" / "__init__.py").touch()
    assert is_allowed("mypackage:make", [], folder / "hetfl_app")
    assert not is_allowed("os:system", [], folder / "hetfl_app")
    assert not is_allowed("timm:resnet18", [], folder / "hetfl_app")
    assert is_allowed("timm:resnet18", ["timm"], folder / "hetfl_app")
    assert is_allowed("resnet18", [], folder / "hetfl_app")
    with pytest.raises(UsageError, match="does not allow the model"):
        refuse_not_allowed(resolve({"model": "elsewhere:make"}), [], folder / "hetfl_app")


def test_a_module_named_as_a_half_of_the_app_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("hetfl.engines.flower.export.find_own_modules", lambda options: [tmp_path / "client_app.py"])
    with pytest.raises(UsageError, match=r"client_app.py' is named as a file of the app itself \(server_app, client_app\)"):
        export(resolve({**THREE_NODES, "extract": "heterofl"}), tmp_path / "app")
    assert not (tmp_path / "app").exists()
