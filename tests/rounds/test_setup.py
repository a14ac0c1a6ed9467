"""The run's own model, where it is narrower than the model it is made of."""

from __future__ import annotations

import pytest
import torch

import hetfl
from hetfl.errors import UsageError
from hetfl.models.state import tensors
from hetfl.rounds.setup import build_node_setup

CNN = {"extract": "heterofl", "aggregate": "overlap", "model": "cnn", "model_args": {"widths": [8, 16]}, "clients": 4}


@pytest.mark.parametrize(("letter", "parameters"), [("c", 98_922), ("d", 25_274), ("e", 6_594)])
def test_the_global_model_has_the_width_of_the_first_letter(simulate, letter, parameters):
    """spec heterofl 2.1, 6.1: CNN of 64, 128, 256, 512 at the widths c, d and e; a client of that level has all of it."""
    of_width = {"global_width": 0.5 ** "abcde".index(letter), "clients": 2}
    made = simulate(1, extract="heterofl", aggregate="overlap", model="cnn", model_args={}, levels=f"{letter}1", **of_width)
    assert sum(p.numel() for p in made.server.builder.model.parameters()) == parameters
    assert {c.profile.width for c in made.server.clients.values()} == {1.0}
    row = made.state.rows[-1]
    assert row["level-1@test"] == row["global@test"]


def test_levels_stay_shares_of_the_whole_model(simulate):
    made = simulate(1, **CNN, levels="1:1,0.5:1,0.25:2", global_width=0.5)
    assert [c.profile.width for c in made.server.clients.values()] == [1.0, 1.0, 0.5, 0.5]
    assert made.server.state["4.weight"].shape == (8, 4, 3, 3)
    assert made.last.assignments[3].state["4.weight"].shape == (4, 2, 3, 3)
    assert {n: t.shape for n, t in made.state.control.items()} == {n: t.shape for n, t in made.server.state.items()}


@pytest.mark.parametrize("extract", ["fedrolex", "fiarse", "scalefl", "fedconv"])
def test_every_method_works_on_a_narrow_global_model(simulate, extract):
    made = simulate(1, **{**CNN, "extract": extract}, levels="0.5:2,0.25:2", global_width=0.5, server_data=0.3)
    assert not any("fault" in row for row in made.state.client_rows)
    name = next(n for n in made.server.state if n.endswith("4.weight"))
    assert made.server.state[name].shape[:2] == (8, 4)


def test_a_node_builds_the_same_narrow_model(simulate):
    made = simulate(0, **CNN, global_width=0.5)
    node = build_node_setup(made.options, made.federation, made.server.widths)
    ours, theirs = tensors(made.server.builder.model), node.builder.initial()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(t, theirs[n]) for n, t in ours.items())


def test_a_finished_run_gives_its_narrow_model_back():
    run = hetfl.run(
        extract="heterofl", model="cnn", model_args={"widths": [8, 16]}, limit=200, clients=3, rounds=1, global_width=0.5
    )
    assert run.model[4].weight.shape == (8, 4, 3, 3)
    assert run.submodel(0.5)[4].weight.shape == (4, 2, 3, 3)
    assert run.clients["parameters"].max() == sum(p.numel() for p in run.model.parameters())


def test_batch_norm_is_replaced_in_exits_too(simulate):
    values = {"model": "cnn", "model_args": {"widths": [4, 8]}, "norm_policy": "layer", "server_data": 0.0}
    made = simulate(1, extract="depthfl", aggregate="overlap", **values)
    assert "heads.0.0.1.weight" in made.server.state
    assert not any("running" in name for name in made.server.state)


def test_a_model_that_cannot_be_cut_has_one_width(simulate):
    with pytest.raises(UsageError, match=r"so only --global-width 1 is possible"):
        simulate(0, extract="full", model="mlp", model_args={"hidden": []}, global_width=0.5)
