"""The works that are timed: hetfl and the loop that stands for no framework at all come to the same parameters."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from helpers.paths import ROOT
from hetfl.config import resolve
from hetfl.rounds.loop import run_round
from hetfl.rounds.reporting import NoCallback
from hetfl.runs.experiment import prepare


def test_the_floor_trains_the_submodels_that_hetfl_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    monkeypatch.setenv("HETFL_BENCH", str(tmp_path))
    from benchmarks.speed.floor import Loop
    from benchmarks.speed.work import WORKS, norm

    whole = WORKS["heflwr"]
    work = replace(whole, data="", clients=2, sampled=2, examples=8, more={**whole.more, "levels": "1:1,0.5:1"})
    floor = Loop(work)
    floor.round(1)
    made = prepare(resolve(work.values), NoCallback())
    before = norm(made.server.state.values())
    run_round(made.state, 1, made.engine)
    assert norm(made.server.state.values()) == pytest.approx(norm(floor.state), rel=1e-6)
    assert norm(made.server.state.values()) != pytest.approx(before, rel=1e-6)
