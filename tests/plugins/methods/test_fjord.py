"""FjORD: what a batch's narrower run is."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from hetfl import prefix
from hetfl.models.state import tensors
from hetfl.plugins.methods import fjord


def test_a_prefix_trains_as_the_module_of_its_width_and_leaves_its_statistics_with_the_whole(simulate):
    server = simulate(0, extract="fjord", aggregate="overlap", model="cnn", model_args={"widths": [8, 8]}).server
    full = server.builder.full
    whole, half = server.builder.load(server.state).train(), server.select(prefix(0.5))
    task = SimpleNamespace(model=whole, builder=server.builder, plan_sizes=full, full_sizes=full)
    alone, x = server.builder.load(half.take(server.state), half.sizes).train(), torch.randn(6, 1, 8, 8)
    assert torch.allclose(fjord.make_prefix(task, half.sizes)(x), alone(x), atol=1e-6)
    after, own, before = tensors(whole), tensors(alone), server.state
    for name in (n for n in after if n.endswith(("running_mean", "running_var"))):
        assert torch.allclose(after[name][:4], own[name], atol=1e-6)
        assert not torch.equal(after[name][:4], before[name][:4])
        assert torch.equal(after[name][4:], before[name][4:])
