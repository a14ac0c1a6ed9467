"""Noise and epsilon."""

from __future__ import annotations

import pytest
import torch

from helpers.runs import ready
from hetfl.aggregation.updates import Merged
from hetfl.hooks.values import Coverage
from hetfl.plugins.wrappers.dp import DP, compute_epsilon, count_coverage
from hetfl.submodel.plan import Patch


def test_noise_follows_the_coverage():
    """Its standard deviation is noise x norm / clients that cover the entry; none where nobody does."""
    made = ready(0, extract="heterofl", aggregate="overlap")
    server = made.server
    server.state = {"w": torch.zeros(4000, 3)}
    columns = [[0, 1], [0], [0]]
    covered = [Coverage(i, {"w": Patch(torch.empty(0), {1: torch.tensor(c)})}, False) for i, c in enumerate(columns)]
    assert torch.equal(count_coverage(server, covered)["w"].expand(4000, 3)[0], torch.tensor([3.0, 1.0, 0.0]))
    server.averages, server.sampled, server.population = True, 3, 3
    found = DP(norm=2.0, noise=1.5).finalize(server, Merged(server.state), covered, 1)
    spread = found.state["w"].std(0)
    assert spread[0] == pytest.approx(1.0, rel=0.1)
    assert spread[1] == pytest.approx(3.0, rel=0.1)
    assert spread[2] == 0
    assert found.facts["epsilon"] > 0


def test_epsilon_grows_with_rounds_and_shrinks_with_noise_and_sampling():
    assert compute_epsilon(1.0, 1e-5, 100, 100, 1) < compute_epsilon(1.0, 1e-5, 100, 100, 10)
    assert compute_epsilon(2.0, 1e-5, 100, 100, 10) < compute_epsilon(1.0, 1e-5, 100, 100, 10)
    assert compute_epsilon(1.0, 1e-5, 10, 100, 10) < compute_epsilon(1.0, 1e-5, 100, 100, 10)


def test_epsilon_is_reported_only_where_the_mechanism_is_the_accountants():
    known, unknown = (ready(1, extract=e, aggregate=a, wrap=("dp",)) for e, a in (("full", "overlap"), ("full", "median")))
    assert known.state.rows[0]["epsilon"] > 0
    assert "epsilon" not in unknown.state.rows[0]
    assert any("no epsilon can be given" in note for note in unknown.server.notes)
