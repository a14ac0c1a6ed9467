"""FedConv's learned weights against its spec's oracles."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from helpers.oracles import T, close, over, update
from helpers.states import same
from hetfl.data.kinds import CLASSIFY
from hetfl.plugins.aggregations.kld import KLD


class Model:
    """Its one parameter is `v`."""

    def named_parameters(self):
        return [("v", torch.nn.Parameter(torch.zeros(2)))]


def aggregated(plugin, updates):
    server = SimpleNamespace(state=updates.old, builder=SimpleNamespace(model=Model()))
    return plugin.aggregate(server, updates, 1).state["v"]


def test_divergences_of_parameters_and_of_outputs():
    """spec fedconv 2.5: KL(softmax(A) || softmax(G)) of parameters; findings 6.7: KL(previous || new) of outputs"""
    new, old = torch.tensor([0.0, 1.0], requires_grad=True), T([2.0, 0.0])
    kl = lambda p, q: (p.softmax(0) * (p.softmax(0) / q.softmax(0)).log()).sum()  # noqa: E731
    found = KLD(kld_on="parameters")._divergence(SimpleNamespace(state={"v": old}), {"v": new}, T([]), T([]))
    assert close(found.detach(), kl(new, old).detach())
    found = KLD(kld_on="outputs")._divergence(SimpleNamespace(kind=CLASSIFY), {}, new[None], old.log_softmax(0)[None])
    assert close(found.detach(), kl(old, new).detach())


def test_the_rate_is_halved_as_the_filters_rate_is(simulate):
    """spec fedconv 3: the weights' learning rate is halved every 25 rounds"""
    options = {"form": "weights", "start": "normal", "guard": False, "steps": 20}
    found = [simulate(1, extract="heterofl", aggregate="kld", server_data=0.3, set={"kld": {**options, **more}}).server.state
             for more in ({"lr": 0.1, "halve_every": 1}, {"lr": 0.05}, {"lr": 0.1})]  # fmt: skip
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


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


def test_weights_that_start_at_random_are_each_clients_own(simulate):
    """spec fedconv 2.8: N(0, 1); a draw for each client and tensor"""
    options = {"kld": {"form": "weights", "start": "normal", "shape": "element", "steps": 0, "guard": False}}
    made = simulate(1, extract="heterofl", aggregate="kld", set=options)
    found = made.plugins.plugins["aggregate.kld"].state_dict()
    drawn = torch.stack([found[f"{client}/1.weight"].flatten() for client in range(3)])
    assert drawn.corrcoef().fill_diagonal_(0).abs().max() < 0.2
    assert float(drawn.std()) == pytest.approx(1, abs=0.1)


def test_steps_of_a_round():
    for options, examples, steps in (({}, 249, 20), ({}, 250, 60), ({"steps": 7}, 9, 7), ({"epochs": 3}, 65, 6)):
        server = SimpleNamespace(public=SimpleNamespace(tune=range(examples)))
        assert KLD(**options)._count_steps(server) == steps
