"""The server by itself."""

from __future__ import annotations

from helpers.states import same


def test_serveralone_does_not_look_at_clients(simulate):
    """spec baselines O5"""
    made = simulate(extract="serveralone", aggregate="overlap", server_data=0.4)
    other = simulate(extract="serveralone", aggregate="overlap", server_data=0.4, epochs=3, lr=0.5)
    assert same(made.server.state, other.server.state)
    assert not same(made.server.state, made.rounds.first)
    assert made.rounds.client_rows == []
