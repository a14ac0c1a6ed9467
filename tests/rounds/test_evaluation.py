"""Every accuracy of a round."""

from __future__ import annotations

import pytest

from hetfl.hooks.server import Server
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
