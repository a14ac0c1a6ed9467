"""Alarms: what looks wrong is said, once."""

from __future__ import annotations

from helpers.runs import ready
from hetfl.data.kinds import CLASSIFY
from hetfl.rounds.alarms import Watch


def test_alarms_sound_once_until_they_go_away():
    watch = Watch(*CLASSIFY.blind(10))
    for round, (accuracy, loss) in enumerate([(0.3, 2.0), (0.1, 2.2), (0.1, 2.2), (0.1, 30.0), (0.5, 1.0)], 1):
        row = {"round": round, "global@test": accuracy, "global@test loss": loss}
        people = [{"round": round, "client": c, "loss": 1.0, "change": 50.0 if (round, c) == (2, 3) else 1.0} for c in range(5)]
        found = " ".join(watch.look(row, people))
        assert ("chance" in found) == (round == 3)
        assert ("exploded" in found) == (round == 4)
        assert ("client 3 changed" in found) == (round == 2)


def test_tuning_that_makes_the_hold_out_worse_is_said():
    made = ready(1, extract="fedconv", aggregate="overlap", set={"fedconv": {"lr": 100.0, "first_steps": 20, "steps": 20}})
    assert "loss on the hold-out rise" in made.state.rows[0].get("alarms", "")
