"""Devices and precision."""

from __future__ import annotations

import pytest
import torch

from hetfl.errors import UsageError


@pytest.mark.parametrize("vmap", ["off", "on"])
def test_bf16_trains_about_as_float32_does_and_keeps_float32_weights(simulate, vmap):
    values = {"extract": "heterofl", "aggregate": "overlap", "vmap": vmap, "pretrain_steps": 0}
    plain, short = (simulate(**values, precision=precision) for precision in ("float32", "bf16"))
    assert not all(torch.equal(t, short.server.state[n]) for n, t in plain.server.state.items())
    for name, tensor in plain.server.state.items():
        assert short.server.state[name].dtype == tensor.dtype
        assert torch.allclose(short.server.state[name], tensor, atol=0.05)


@pytest.mark.parametrize(("device", "said"), [
    ("gpu", "--device 'gpu' is no device; cpu, cuda or cuda:0 are"), ("meta", "--device meta is not supported; cpu and cuda are"),
    ("cuda:99", "--device cuda:99 cannot be used: this .* --device cpu can"),
])  # fmt: skip
def test_a_device_that_is_not_there_gets_one_sentence(simulate, device, said):
    with pytest.raises(UsageError, match=said):
        simulate(steps=0, extract="full", aggregate="overlap", device=device)
