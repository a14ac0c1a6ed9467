"""Plugins that do what no plugin should: a client's mistake costs that client its round, the server's ends the run by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers import rogues
from hetfl.errors import RunError
from hetfl.rounds.loop import run_round


def test_a_profile_without_words_costs_one_client_its_round(simulate):
    made = simulate(1, extract="heterofl", profile="helpers.rogues:Mute", levels=None)
    faults = {row["client"]: row["fault"] for row in made.state.client_rows if "fault" in row}
    assert faults == {1: "its profile: what keeps it from more is int, no text"}


def test_a_sparse_reply_costs_one_client_its_round(simulate):
    made = simulate(1, extract="heterofl", wrap=("helpers.rogues:Sparse",))
    assert [row["client"] for row in made.state.client_rows if "fault" in row] == [1]


def test_what_a_client_writes_into_stays_with_it(simulate):
    made = simulate(0, extract="hermes", wrap=("helpers.rogues:Careless",), workers=1, rounds=2, set={"hermes": {"threshold": 0.0}})
    try:
        for number in (1, 2):
            now = run_round(made.state, number, made.engine)
            assert not any("fault" in row for row in made.state.client_rows), made.state.client_rows[-1]["fault"]
            assert all(bool(mask.any()) for a in now.assignments.values() for mask in a.plan.masks.values())
    finally:
        torch.set_grad_enabled(True)


def wider(merged):
    return replace(merged, state={n: t.double() if t.is_floating_point() else t for n, t in merged.state.items()})


def leave(merged):
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        (wider, "as .* of float64, not .* of float32"),
        (lambda m: replace(m, state={n: t.to("meta") for n, t in m.state.items()}), "on no device"),
        (lambda m: replace(m, state={**m.state, "more": torch.ones(1)}), "a tensor 'more', which the model does not have"),
        (lambda m: replace(m, branches={"b": {"w": 5}}), "branches are not patches"),
        (lambda m: replace(m, facts={"round": 7}), "a fact under the name 'round', which is a column of the run's own"),
        (lambda m: replace(m, facts={"global@test": 1.0}), "a column of the run's own"),
        (lambda m: replace(m, facts={"x": "=1+1"}), "a fact 'x' of type str"),
        (lambda m: replace(m, facts={f"{i}": 1.0 for i in range(100)}), "at most 64 numbers"),
        (leave, "failed in aggregate, round 1: SystemExit"),
    ],
)
def test_an_aggregation_that_answers_nonsense_is_named(simulate, monkeypatch, how, why):
    monkeypatch.setattr(rogues, "HOW", [how])
    with pytest.raises(RunError, match=f"aggregate plugin 'Merging' .*{why}"):
        simulate(1, extract="heterofl", aggregate="helpers.rogues:Merging")
