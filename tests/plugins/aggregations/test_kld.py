"""FedConv's learned weights against its spec's oracles."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from helpers.oracles import T, close, over, update
from hetfl.plugins.aggregations.kld import KLD


class Model:
    """Its one parameter is `v`."""

    def named_parameters(self):
        return [("v", None)]


def aggregated(plugin, updates):
    server = SimpleNamespace(state=updates.old, builder=SimpleNamespace(model=Model()))
    return plugin.aggregate(server, updates, 1).state["v"]


@pytest.mark.parametrize(("form", "old"), [("weights", 9.0), ("update", 0.0)])
@pytest.mark.parametrize("shape", ["client", "tensor", "channel", "element"])
def test_weighted_aggregation(form, old, shape):
    """spec fedconv 6.6: n = (1, 3), D_1 = 0, D_2 = 4: w = 1 gives 3, w_2 = 0.5 gives 1.5"""
    updates = over([old, old], update(1, [0.0, 0.0], 1.0), update(2, [4.0, 4.0], 3.0))
    plugin = KLD(form=form, shape=shape, steps=0)
    assert close(aggregated(plugin, updates), [3.0, 3.0])
    plugin.load_state_dict({"2/v": torch.full((2,) if shape in ("channel", "element") else (1,), 0.5)})
    assert close(aggregated(plugin, updates), [1.5, 1.5])


def test_a_weights_gradient_is_the_clients_share_of_the_examples():
    """spec fedconv 6, properties: with elementwise w, dA / dw_k = n_k D_k / sum n"""
    updates = over([9.0, 9.0], update(1, [1.0, 2.0], 1.0), update(2, [4.0, -8.0], 3.0))
    plugin = KLD(form="weights", shape="element", steps=0)
    before = aggregated(plugin, updates)
    plugin.load_state_dict({name: w + T([1.0, 0.0]) if name == "2/v" else w for name, w in plugin.state_dict().items()})
    assert close(aggregated(plugin, updates) - before, [3.0 * 4 / 4, 0.0])
