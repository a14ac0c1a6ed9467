"""Tuning with early stopping."""

from __future__ import annotations

import torch

from hetfl.data.dataset import Examples
from hetfl.rng import stream
from hetfl.runs import summary
from hetfl.training.tuning import tune


def test_tuning_never_ends_worse_than_it_began_by_the_hold_out():
    """findings 6.5: step 0 is among the choices"""
    w = torch.zeros(1, requires_grad=True)
    data = Examples(torch.zeros(8, 1), torch.zeros(8, dtype=torch.long), torch.arange(8))
    wrong = tune(data, [w], lambda _: (w - 1).square().sum(), lambda: float(w.abs()), stream(0, "t"), steps=25, lr=0.1, batch=4)
    assert wrong.step == 0
    assert w.item() == 0
    towards = lambda: float((w - 1).abs())  # noqa: E731
    right = tune(data, [w], lambda _: (w - 1).square().sum(), towards, stream(0, "t"), steps=25, lr=0.1, batch=4)
    assert right.step > 0
    assert right.best < right.start


def test_early_stopping_keeps_the_best_step_and_says_what_it_saved(simulate):
    made = simulate(
        extract="fedconv", aggregate="overlap", set={"fedconv": {"first_steps": 400, "lr": 0.5, "patience": 2}}, steps=1
    )
    steps, epochs = (sum(part) for part in zip(*made.server.saved, strict=True))
    assert steps > 0
    assert epochs > 0
    assert made.rounds.rows[0]["server steps saved"] == steps
    assert made.rounds.rows[0]["server steps"] == 400 - steps
    assert any(f"saved {steps} of" in note for note in summary.early_stopping_note(made))
    whole = simulate(
        extract="fedconv", aggregate="overlap", set={"fedconv": {"first_steps": 400, "lr": 0.5, "patience": 0}}, steps=1
    )
    assert whole.rounds.rows[0]["server steps"] == 400
    assert not summary.early_stopping_note(whole)
