"""The whole model or nothing."""

from __future__ import annotations

from helpers.states import same


def test_exclusive_lets_small_clients_sit_out(simulate):
    made = simulate(extract="exclusive", aggregate="fedavg")
    assert {row["client"] for row in made.rounds.client_rows} == {0}
    none = simulate(extract="exclusive", aggregate="fedavg", levels="0.5")
    assert same(none.server.state, none.rounds.first)
    assert any("no client could afford" in note for note in none.server.notes)
