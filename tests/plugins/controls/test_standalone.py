"""Clients by themselves."""

from __future__ import annotations

from helpers.states import same, sent_and_got


def test_standalone_sends_nothing_and_depends_on_nobody_else(simulate, monkeypatch):
    """spec baselines O4"""
    seen = sent_and_got(monkeypatch)
    made = simulate(extract="standalone", aggregate="overlap")
    assert all(row["bytes down"] == row["bytes up"] == 0 for row in made.rounds.client_rows)
    assert same(made.server.state, made.rounds.first)
    alone = {round: after for client, round, _, after, _ in seen if client == 1}
    for client, round, before, *_ in seen:
        if client == 1 and round > 1:
            assert same(before, alone[round - 1])
    seen.clear()
    data = made.federation.clients[0].train
    fewer = simulate(extract="standalone", aggregate="overlap", steps=0)
    holding = fewer.federation.clients[0]
    object.__setattr__(holding, "train", type(data)(data.x, data.y, data.index[: len(data) // 2]))
    for round in (1, 2, 3):
        fewer.rounds.step(round, fewer.grid)
    assert all(same(after, alone[round]) for client, round, _, after, _ in seen if client == 1)
    assert "personal@own" in made.rounds.rows[-1]


def test_standalone_may_start_from_the_server(simulate):
    made = simulate(extract="standalone", aggregate="overlap", set={"standalone": {"start": "server"}})
    down = {row["round"]: row["bytes down"] for row in made.rounds.client_rows}
    assert down[1] > 0 == down[2] == down[3]
