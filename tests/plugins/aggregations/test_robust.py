"""Medians and trimmed means."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.oracles import close, over, quick, update
from hetfl.aggregation.mean import mean
from hetfl.plugins.aggregations import robust


@quick
@given(st.integers(1, 5), st.integers(0, 99))
def test_robust_means_stay_within_the_covering_clients(clients, seed):
    g = torch.Generator().manual_seed(seed)
    values, masks = torch.randn(clients, 6, generator=g), torch.rand(clients, 6, generator=g) > 0.4
    updates = over([9.0] * 6, *(update(c, v.tolist(), mask=m.tolist()) for c, (v, m) in enumerate(zip(values, masks, strict=True))))
    for plugin in (robust.Median(), robust.TrimmedMean(trim=0.25), robust.TrimmedMean(trim=0)):
        new = plugin.aggregate(updates).state["v"]
        for k in range(6):
            held = values[masks[:, k], k]
            assert (held.min() - 1e-6 <= new[k] <= held.max() + 1e-6) if len(held) else new[k] == 9
    assert close(robust.TrimmedMean(trim=0).aggregate(updates).state["v"], mean(updates, [1.0] * clients)["v"], 1e-5)
    middle = robust.Median().aggregate(over([9.0], *(update(c, [float(v)]) for c, v in enumerate((1, 100, 2))))).state["v"]
    assert middle.item() == 2
