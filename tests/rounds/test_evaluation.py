"""Every accuracy of a round."""

from __future__ import annotations

import re

import pytest
import torch

from hetfl import registry
from hetfl.hooks.loading import load_class
from hetfl.hooks.server import Server
from hetfl.hooks.values import Client
from hetfl.profiling.node import Profile
from hetfl.rounds import evaluator as exams
from hetfl.rounds.loop import run_round
from hetfl.training import evaluation


def test_each_model_is_tested_once_and_as_if_by_itself(simulate, monkeypatch):
    """A level that is the whole model, and what a client was sent and the round before tested, are not tested again."""
    seen, whole = [], evaluation.score_batches

    def score_batches(model, data, part):
        seen.append(sum(p.numel() for p in model.parameters()))
        return whole(model, data, part)

    monkeypatch.setattr(exams, "score_batches", score_batches)
    made = simulate(extract="heterofl", aggregate="overlap", levels="1,0.5,0.5", steps=1)
    pieces = -(-len(made.state.test) // (made.options.eval_batch_size * exams.PIECE))
    assert len(seen) == 4 * pieces  # in round 1: the new and the sent one of both levels
    seen.clear()
    run_round(made.state, 2, made.engine)
    assert len(seen) == 2 * pieces
    first, second = made.state.rows
    assert second["sent-0.5@test"] == first["level-0.5@test"]
    assert second["level-1@test"] == second["global@test"]
    score = made.server.score(made.server.state, made.state.test)
    assert second["global@test"] == score.accuracy
    assert second["global@test loss"] == pytest.approx(score.loss)


def test_a_control_that_was_not_trained_is_not_tested_again(simulate, monkeypatch):
    made = simulate(1, extract="heterofl", aggregate="overlap", levels="1", control=True)
    seen, whole = [], evaluation.score_batches
    pieces = -(-len(made.state.test) // (made.options.eval_batch_size * exams.PIECE))
    with monkeypatch.context() as patched:
        patched.setattr(Server, "score", lambda *_: pytest.fail("it was"))
        patched.setattr(exams, "score_batches", lambda model, data, part: seen.append(model) or whole(model, data, part))
        run_round(made.state, 2, made.engine)
    assert len(seen) == pieces  # the new global model
    first, second = (row["control@test"] for row in made.state.rows)
    assert first == second == made.server.score(made.state.control, made.state.test).accuracy


def test_the_control_takes_as_many_steps_of_as_many_examples_as_the_method(simulate, monkeypatch):
    """Filters are tuned in batches of 64, the weights in batches of 16, where pre-training has 32."""
    seen = []
    whole = Server._note_tuning

    def note_tuning(self, tuned, steps, batch, purpose):
        seen.append((purpose.split()[0], batch, tuned[0].steps))
        return whole(self, tuned, steps, batch, purpose)

    monkeypatch.setattr(Server, "_note_tuning", note_tuning)
    tuned = {"fedconv": {"steps": 7, "first_steps": 7}, "kld": {"steps": 9, "batch_size": 16}}
    more = {"levels": "0.5", "limit": 600, "server_data": 0.3}
    made = simulate(1, extract="fedconv", aggregate="kld", control=True, set=tuned, **more)
    spent = sorted((batch, steps) for purpose, batch, steps in seen if purpose in ("compressor", "kld"))
    assert spent == [(16, 9), (64, 7)]
    assert sorted((batch, steps) for purpose, batch, steps in seen if purpose == "control") == spent
    assert made.state.rows[0]["server steps"] == 16


STATIC = {"model": "cnn", "model_args": {"widths": [8, 8]}, "norm_policy": "static"}

REDRAWN = {"aggregate": "overlap", "levels": "1,0.5,0.25,0.125", "set": {"levels": {"tiers": 1}}, "clients": 4, "fraction": 0.5}


@pytest.mark.parametrize(("extract", "more"), [("heterofl", {}), ("fedrolex", {}), ("heterofl", STATIC)])
def test_levels_that_nobody_had_in_a_round_are_tested_as_their_plans_part(simulate, extract, more):
    made = simulate(steps=0, **REDRAWN, **more, extract=extract, rounds=2)
    server, missing = made.server, 0
    for number in (1, 2):
        row = run_round(made.state, number, made.engine).row
        had = {row["level"] for row in made.state.client_rows if row["round"] == number}
        assert {name for name in row.results if re.fullmatch(r"level-[0-9.]+@test", name)} == {
            f"level-{level}@test" for level in ("1", "0.5", "0.25", "0.125")
        }
        for level in {"1", "0.5", "0.25", "0.125"} - had:
            missing += 1
            plan = made.plugins.extract(server, [Client(0, Profile(float(level)))], number)[0]
            if not more:
                score = server.score(plan.take(server.state), made.federation.test, plan.sizes)
                assert row.results[f"level-{level}@test"] == score.accuracy
            assert f"sent-{level}@test" not in row.results
    assert missing


def test_only_plans_by_width_are_made_for_levels_that_nobody_had(simulate):
    made = simulate(steps=0, **REDRAWN, extract="feddropout", rounds=1)
    row = run_round(made.state, 1, made.engine).row
    had = {row["level"] for row in made.state.client_rows}
    assert {name.split("@")[0] for name in row.results if re.fullmatch(r"level-[0-9.]+@test", name)} == {f"level-{n}" for n in had}


@pytest.mark.parametrize("name", [e.name for e in registry.builtins() if e.role == "extract" and load_class(e).plans_by_width])
def test_a_plan_by_width_is_anybodys(simulate, name):
    made = simulate(
        steps=0, extract=name, aggregate="overlap", **({"model": "fedconv-cnn", "model_args": {}} if name == "scalefl" else {})
    )
    for width in (1.0, 0.5):
        plans = [made.plugins.extract(made.server, [Client(i, Profile(width))], 2)[0] for i in (-1, 0, 2)]
        assert all(plan.sizes == plans[0].sizes for plan in plans)
        taken = [plan.take(made.server.state) for plan in plans]
        assert all(torch.equal(state[n], t) for state in taken for n, t in taken[0].items())
