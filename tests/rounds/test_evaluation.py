"""Every accuracy of a round."""

from __future__ import annotations

import pytest

from hetfl.rounds import evaluation as exams
from hetfl.training import evaluation


def test_each_model_is_tested_once_and_as_if_by_itself(simulate, monkeypatch):
    """A level that is the whole model, and what a client was sent and the round before tested, are not tested again."""
    seen, whole = [], evaluation.examine

    def examine(model, data, part):
        seen.append(sum(p.numel() for p in model.parameters()))
        return whole(model, data, part)

    monkeypatch.setattr(exams, "examine", examine)
    made = simulate(extract="heterofl", aggregate="overlap", levels="1,0.5,0.5", steps=1)
    pieces = -(-len(made.rounds.test) // (made.options.eval_batch_size * exams.PIECE))
    assert len(seen) == 4 * pieces  # in round 1: the new and the sent one of both levels
    seen.clear()
    made.rounds.step(2, made.grid)
    assert len(seen) == 2 * pieces
    first, second = made.rounds.rows
    assert second["sent-0.5@test"] == first["level-0.5@test"]
    assert second["level-1@test"] == second["global@test"]
    score = made.server.score(made.server.state, made.rounds.test)
    assert second["global@test"] == score.accuracy
    assert second["global@test loss"] == pytest.approx(score.loss)
