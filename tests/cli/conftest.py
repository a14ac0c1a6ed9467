"""A run that has ended."""

from __future__ import annotations

import pytest

from helpers.cli import QUICK, exit_code
from helpers.paths import ROOT


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a"
    assert exit_code("run", *QUICK, "--out", out, "--set", "overlap.weighting=samples") == 0
    return out


@pytest.fixture
def nets(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "helpers"))
