"""A matrix whose cells are tasks of a Ray cluster."""

from __future__ import annotations

import csv

import pytest

from helpers.cli import exit_code
from helpers.ray_nodes import begins_ray
from hetfl.errors import UsageError
from hetfl.runs import runner, sweep
from hetfl.runs.folder import RunFolder

cluster = pytest.importorskip("hetfl.runs.cluster")

WORDS = [
    "matrix", "--extract", "heterofl", "--sweep", "lr=0.1,0.01", "--wrap", "helpers.deadly:Slow", "--limit", "150",
    "--clients", "3", "--rounds", "1", "--epochs", "1", "--pretrain-steps", "2", "--seeds", "0,",
]  # fmt: skip


def rows(out):
    found = list(csv.DictReader((out / "matrix.csv").read_text().splitlines()))
    return [{name: value for name, value in row.items() if "seconds" not in name} for row in found]


def matrix(out, *words):
    assert exit_code(*WORDS, *words, "--out", out) == 0
    return rows(out)


@pytest.mark.slow
@begins_ray
def test_a_matrix_on_ray_is_the_one_on_this_machine_and_is_not_run_again(tmp_path, monkeypatch):
    """A cell that is not there is run, with a plugin of the user's; what is there is kept, and needs no Ray."""
    here = matrix(tmp_path / "here")
    there = matrix(tmp_path / "there", "--on", "ray")
    assert here == there
    assert (next((tmp_path / "there").glob("cells/heterofl*")) / "weights.safetensors").exists()
    monkeypatch.setattr(cluster, "connect", lambda *_: pytest.fail("every cell was there"))
    assert matrix(tmp_path / "there", "--on", "ray") == here


@pytest.fixture
def cell(tmp_path):
    (trial,) = sweep.plan_trials({}, [("heterofl", "overlap")], {}, [0])
    return trial, tmp_path / "cells" / trial.name


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"workers": 64}, r"no node of the Ray cluster has 64 cores \(--workers\)$"),
        ({"workers": 16, "device": "cuda"}, r"has 16 cores \(--workers\) and 1 GPU \(--device cuda, --client-gpus\)$"),
        ({"device": "cuda", "client_gpus": 3}, r"has 1 core \(--workers\) and 3 GPUs"),
    ],
)
def test_a_task_that_no_node_has_room_for_is_refused_and_not_waited_for(tmp_path, monkeypatch, values, why):
    """Of three nodes one has cores, one GPUs, and one, with both, is dead."""
    nodes = [(True, {"CPU": 16.0}), (True, {"CPU": 4.0, "GPU": 2.0}), (False, {"CPU": 99.0, "GPU": 9.0})]
    ended = []
    monkeypatch.setattr(cluster, "connect", lambda *_: True)
    monkeypatch.setattr(cluster, "begin", lambda trial: pytest.fail("it would wait for ever"))
    monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": alive, "Resources": has} for alive, has in nodes])
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: ended.append(True))
    with pytest.raises(UsageError, match=why):
        next(cluster.run_on_ray(sweep.plan_trials(values, [("heterofl", "overlap")], {}, [0]), tmp_path))
    assert ended, "the Ray that was begun for it goes on"
    cluster.refuse_too_large(sweep.plan_trials({"device": "cuda", "workers": 4}, [("heterofl", "overlap")], {}, [0]))


@pytest.mark.parametrize(("engine", "kept"), [("local", (None, None)), ("ray", ("auto", 0.5))])
def test_what_was_for_the_task_is_no_option_of_its_run_unless_that_is_on_ray_too(monkeypatch, engine, kept):
    seen = []
    monkeypatch.setattr(runner, "run", lambda options, *_: seen.append((options.ray_address, options.client_gpus)))
    values = {"engine": engine, "ray_address": "auto", "client_gpus": 0.5, "device": "cuda"}
    cluster.run_cell(*sweep.plan_trials(values, [("heterofl", "overlap")], {}, [0]), 1)
    assert seen == [kept]


def test_the_summary_is_written_last(tmp_path, cell, monkeypatch):
    _, path = cell
    written = []
    monkeypatch.setattr(cluster.ray, "get", lambda task: {"summary.json": b"{}", "config.toml": b"x=1", "metrics.csv": b"r"})
    monkeypatch.setattr(RunFolder, "write", lambda folder, name, content: written.append(name))
    cluster.keep(None, path)
    assert written[-3:] == ["config.toml", "metrics.csv", "summary.json"]


def test_a_task_that_fails_is_its_cells_failure(tmp_path, cell, monkeypatch):
    trial, path = cell

    def lost(task):
        raise cluster.RayError("all nodes are gone")

    monkeypatch.setattr(cluster.ray, "get", lost)
    cluster.keep(None, path)
    assert sweep.read_result(tmp_path, trial).row["why"] == "the Ray task of this run has failed: all nodes are gone"
