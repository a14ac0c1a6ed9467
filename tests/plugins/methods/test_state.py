"""What plugins keep goes through their state: a plugin that forgets all else goes on to the same bits."""

from __future__ import annotations

import pytest
import torch

from helpers.residual import RESIDUAL
from helpers.states import same
from hetfl.rounds.loop import run_round

FILTERS = {"start": "random", "steps": 5, "first_steps": 5, "lr": 0.1}

DILATORS = {**FILTERS, "dilator_steps": 5, "dilator_lr": 0.1}

WEIGHTS = {"form": "weights", "start": "normal", "guard": False, "steps": 20, "lr": 0.1}

WHO = {
    "fedconv x kld": {"extract": "fedconv", "aggregate": "kld", "server_data": 0.3, "set": {"fedconv": FILTERS, "kld": WEIGHTS}},
    "fedconv x overlap": {"extract": "fedconv", "aggregate": "overlap", "set": {"fedconv": DILATORS}},
    "lotteryfl": {"extract": "lotteryfl", "aggregate": "overlap", "set": {"lotteryfl": {"threshold": 0.0}}},
    "hermes": {"extract": "hermes", "aggregate": "hermes", "set": {"extract": {"hermes": {"threshold": 0.0}}}},
    "tailorfl": {"extract": "tailorfl", "aggregate": "tailorfl", "set": {"extract": {"tailorfl": {"steps": 2}}}},
    "dac": {"extract": "dac", "aggregate": "cluster", "levels": "1,0.7,0.4", "set": {"dac": {"epochs": 1}}},
    "inclusivefl": {"extract": "inclusivefl", "aggregate": "inclusivefl", **RESIDUAL, "set": {"inclusivefl": {"by": "number"}}},
    "fedmd": {"extract": "fedmd", "aggregate": "fedmd", "set": {"fedmd": {"public_epochs": 1}}},
    "flora": {"extract": "loraranks", "aggregate": "flora", "adapter": "lora:rank=2", "model_args": {"hidden": [60, 40]}},
    "fedtgp": {"extract": "heterofl", "aggregate": "fedtgp", "set": {"fedtgp": {"epochs": 2}}},
}  # fmt: skip


def forget(plugin):
    """A plugin as it is when a process begins: its options are all that it has."""
    plugin.__pydantic_private__ = type(plugin)(**plugin.model_dump()).__pydantic_private__


def after_a_third_round(simulate, values, between):
    """What two rounds, `between(plugin)` for each plugin and a third round come to: models, what plugins keep, bytes by client."""
    made = simulate(**values, steps=2)
    for plugin in made.plugins.plugins.values():
        between(plugin)
    run_round(made.state, 3, made.engine)
    branches = {f"{name}/{n}": patch.values for name, branch in made.server.branches.items() for n, patch in branch.items()}
    spent = [[row["bytes down"], row["bytes up"]] for row in made.state.client_rows]
    kept = {f"{key}/{n}": t for key, plugin in made.plugins.plugins.items() for n, t in plugin.state_dict().items()}
    return {**made.server.state, **branches, **kept, "bytes": torch.tensor(spent)}


@pytest.mark.parametrize("who", WHO)
def test_what_a_plugin_keeps_goes_through_its_state(simulate, who):
    kept = {}

    def through(plugin):
        state = {name: tensor.clone() for name, tensor in plugin.state_dict().items()}
        forget(plugin)
        plugin.load_state_dict(state)
        assert same(plugin.state_dict(), state)
        kept.update(state)

    whole = after_a_third_round(simulate, WHO[who], lambda plugin: None)
    assert same(after_a_third_round(simulate, WHO[who], through), whole)
    assert kept
    assert not same(after_a_third_round(simulate, WHO[who], forget), whole)


def test_both_filters_of_fedconv_and_the_weights_of_kld_are_kept(simulate):
    made = simulate(**WHO["fedconv x overlap"], steps=2)
    assert {name.split()[0] for name in made.plugins.plugins["extract.fedconv"].state_dict()} == {"compressor", "dilator"}
    made = simulate(**WHO["fedconv x kld"], steps=2)
    clients = {name.split("/")[0] for name in made.plugins.plugins["aggregate.kld"].state_dict()}
    assert clients == {"0", "1", "2"}
