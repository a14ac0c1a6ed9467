"""A cache of its own for every module, and a numbered data set."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.datasets import rows, write


@pytest.fixture(autouse=True, scope="module")
def shared_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HETFL_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("HETFL_DATA", raising=False)
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HETFL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("numbered")
    write(folder, rows(1000, 60), "test")
    return write(folder, rows(0, 300))
