"""splitmix beside other plugins."""

from __future__ import annotations


def test_clients_of_several_bases_train_with_the_masked_loss(simulate):
    made = simulate(1, extract="splitmix", aggregate="overlap", wrap=["maskloss"], set={"splitmix": {"bases": 2}})
    assert not [row["fault"] for row in made.state.client_rows if "fault" in row]
