"""Flower's simulation as an engine."""

from __future__ import annotations

import pytest

from hetfl.config import resolve


def test_without_a_run_folder_clients_remember_in_a_place_that_goes_with_the_engine(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from hetfl.engines.flower.simulation import SimulationEngine

    monkeypatch.chdir(tmp_path)
    engine = SimulationEngine(2, resolve({}), "", None)
    place = engine._folder
    assert place.is_dir()
    assert not place.is_relative_to(tmp_path)
    del engine
    assert not place.exists()
