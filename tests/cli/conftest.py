"""A run that has ended."""

from __future__ import annotations

import pytest

from helpers.cli import QUICK
from helpers.paths import ROOT
from hetfl.cli.main import main


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a"
    with pytest.raises(SystemExit) as ended:
        main(["run", *QUICK, "--out", str(out), "--set", "overlap.weighting=samples"])
    assert ended.value.code == 0
    return out


@pytest.fixture
def nets(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "helpers"))
