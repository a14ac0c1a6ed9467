"""Medians and trimmed means."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.oracles import close, over, quick, update
from hetfl.aggregation.mean import mean
from hetfl.plugins.aggregations import geomedian, krum, robust


@quick
@given(st.integers(1, 5), st.integers(0, 99))
def test_robust_means_stay_within_the_covering_clients(clients, seed):
    g = torch.Generator().manual_seed(seed)
    values, masks = torch.randn(clients, 6, generator=g), torch.rand(clients, 6, generator=g) > 0.4
    updates = over([9.0] * 6, *(update(c, v.tolist(), mask=m.tolist()) for c, (v, m) in enumerate(zip(values, masks, strict=True))))
    for plugin in (robust.Median(), robust.TrimmedMean(trim=0.25), robust.TrimmedMean(trim=0)):
        new = plugin.aggregate(SimpleNamespace(state=updates.old), updates, 2).state["v"]
        for k in range(6):
            held = values[masks[:, k], k]
            assert (held.min() - 1e-6 <= new[k] <= held.max() + 1e-6) if len(held) else new[k] == 9
    untrimmed = robust.TrimmedMean(trim=0).aggregate(SimpleNamespace(state=updates.old), updates, 2).state["v"]
    assert close(untrimmed, mean(updates, [1.0] * clients)["v"], 1e-5)
    three = over([9.0], *(update(c, [float(v)]) for c, v in enumerate((1, 100, 2))))
    middle = robust.Median().aggregate(SimpleNamespace(state={"v": torch.tensor([9.0])}), three, 2).state["v"]
    assert middle.item() == 2


def server_of(updates):
    """A server whose model has the one tensor `v`."""
    model = SimpleNamespace(named_parameters=lambda: [("v", None)])
    return SimpleNamespace(state=updates.old, builder=SimpleNamespace(model=model), alarms=[])


def fleet(attack):
    """Of 10 clients the first two hold both entries and answer `attack`, the others hold one and answer about 1."""
    honest = (update(c, [1 + c / 100], index={0: torch.tensor([0])}) for c in range(2, 10))
    return over([0.0, 0.0], *(update(c, [attack, attack]) for c in range(2)), *honest)


def test_with_least_five_a_median_resists_two_attackers_of_any_coverage():
    attacked = fleet(-100.0)
    plain, fixed = (robust.Median(least=n).aggregate(server_of(attacked), attacked, 2).state["v"] for n in (1, 5))
    assert close(plain, [1.045, -100])
    assert close(fixed, [1.045, 0])
    trimmed = robust.TrimmedMean(trim=0.4, least=5).aggregate(server_of(attacked), attacked, 2).state["v"]
    assert close(trimmed, [1.045, 0])  # of the eight values 1.02 … 1.09 and two of -100 four go at either end


def test_krum_and_geometric_median_resist_two_attackers_who_alone_cover_an_entry():
    for attack in (-100.0, 5.0):
        attacked = fleet(attack)
        chosen = krum.Krum(attackers=2).aggregate(server_of(attacked), attacked, 1).state["v"]
        assert close(chosen, [1.055, 0])
        near, far = geomedian.GeoMedian().aggregate(server_of(attacked), attacked, 1).state["v"]
        assert 1 <= near <= 1.1
        assert far == 0


def test_what_a_fleet_cannot_resist_is_said_in_the_first_round():
    updates = fleet(1.0)
    server = server_of(updates)
    robust.Median().aggregate(server, updates, 1)
    robust.TrimmedMean().aggregate(server, updates, 1)
    krum.Krum(attackers=4).aggregate(server, updates, 1)
    assert "so few clients cover 50% of the weights that one attacker" in server.alarms[0]
    assert "50% of the weights" in server.alarms[1]
    assert "50% resist one but not two" in server.alarms[1]
    assert server.alarms[2] == "krum: 10 replies resist 3 attackers, not 4"
    server.alarms.clear()
    robust.Median(least=5).aggregate(server, updates, 1)
    robust.Median().aggregate(server, updates, 2)
    assert server.alarms == []


def test_krum_of_clients_that_share_nothing_averages_them():
    apart = over([0.0, 0.0], *(update(c, [float(c + 1)], index={0: torch.tensor([c])}) for c in range(2)))
    assert close(krum.Krum().aggregate(server_of(apart), apart, 2).state["v"], [1, 2])


def test_krum_sums_over_the_n_minus_f_minus_two_nearest():
    """Blanchard et al. 2017: of five clients with one attacker two; the third nearest would have left out 0 in place of 1"""
    distances = torch.full((5, 5), 1.0)
    distances[1, :] = distances[:, 1] = 5.0
    for a, b in ((0, 1), (0, 4)):
        distances[a, b] = distances[b, a] = 100.0
    assert krum.choose_nearest(distances, 1) == [0, 2, 3, 4]


def test_krums_distances_are_per_entry_that_both_cover():
    apart = over([0.0] * 4, update(0, [1.0] * 4), update(1, [2.0] * 4), update(2, [2.0, 2, 0, 0], mask=[1, 1, 0, 0]),
                 update(3, [0.0, 0, 0, 5], mask=[0, 0, 0, 1]))  # fmt: skip
    found = krum.measure_distances(apart, ["v"])
    assert found[0].tolist() == [0, 1, 1, 16]
    assert found[1].tolist() == [1, 0, 0, 9]
    assert found[2, 3].isnan()


def test_the_geometric_median_of_a_right_triangle_is_its_fermat_point():
    """By hand: of (0, 0), (1, 0), (0, 1) the point with the least sum of distances is x = y = (3 - sqrt 3) / 6."""
    corners = over([0.0, 0.0], *(update(c, list(v)) for c, v in enumerate([(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)])))
    found = geomedian.GeoMedian(steps=100, least=0).aggregate(server_of(corners), corners, 1).state["v"]
    assert close(found, [(3 - 3**0.5) / 6] * 2, 1e-4)


def test_krum_takes_nobody_for_an_outlier_with_whom_none_shares_an_entry():
    distances = torch.ones(6, 6)
    distances[5, :5] = distances[:5, 5] = float("nan")
    distances[0, 1:5] = distances[1:5, 0] = 9.0
    assert krum.choose_nearest(distances, 1) == [1, 2, 3, 4, 5]


def test_the_geometric_median_of_one_client_is_that_client():
    alone = over([0.0, 0.0], update(0, [1.0, 2.0]))
    assert close(geomedian.GeoMedian(least=0).aggregate(server_of(alone), alone, 2).state["v"], [1, 2])
