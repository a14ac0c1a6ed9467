"""What plugins keep goes through their state."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from helpers.plugin_states import loaded
from helpers.states import same
from hetfl.plugins.aggregations.kld import KLD
from hetfl.plugins.methods.fedconv.strategy import FedConv


@pytest.mark.parametrize("extract", ["lotteryfl", "hermes", "tailorfl"])
def test_what_an_extraction_keeps_goes_through_its_state(simulate, extract):
    made = simulate(
        extract=extract,
        aggregate="overlap",
        steps=2,
        set={extract: {"threshold": 0.0}} if extract in ("lotteryfl", "hermes") else {},
    )
    plugin = made.plugins.plugins[f"extract.{extract}"]
    assert plugin.state_dict()
    assert same(plugin.state_dict(), loaded(plugin).state_dict())


def test_state_of_fedconv_and_kld_survives():
    kld = KLD()
    kld._w = {"0/w": torch.ones(2)}
    other = KLD()
    other.load_state_dict(kld.state_dict())
    assert torch.equal(other._w["0/w"], torch.ones(2))
    assert SimpleNamespace(**FedConv().model_dump()).steps == 20
