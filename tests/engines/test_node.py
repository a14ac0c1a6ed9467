"""A client as a node runs it."""

from __future__ import annotations

import pytest
import torch

from helpers.runs import FOUR_CLIENTS
from hetfl.config import resolve
from hetfl.rounds.messages import Instruction
from hetfl.rounds.records import RecordCodec
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import experiment
from hetfl.runs.experiment import prepare


def test_flowers_client_mods_work_on_submodels(tmp_path):
    from flwr.app import Message

    from hetfl.config import write
    from hetfl.engines.flower.export import modes
    from hetfl.engines.flower_internals import number
    from hetfl.engines.local import context, node
    from hetfl.engines.node import NodeConfig, client_app

    made = prepare(resolve({**FOUR_CLIENTS, "extract": "heterofl", "aggregate": "overlap", "levels": "0.5:1"}), NoCallback())
    plan = made.server.select(lambda size: torch.arange((size + 1) // 2))
    state, place = plan.take(made.server.state), NodeConfig(write(experiment.resolved(made), made.plugins.options()), tmp_path)
    moved = []
    for mods in ([], [["LocalDpMod", 0.01, 0.0, 8.0, 1e-5], ["message_size_mod"], ["arrays_size_mod"]]):
        message = Message(RecordCodec().seal(Instruction(1, state, plan.sizes)), node(0), "train", group_id="1")
        number(message, "m")
        reply = RecordCodec().open(client_app(lambda _: place, modes(mods))(message, context(0, 4)).content)
        moved.append(float(torch.stack([(reply.state[n] - state[n]).norm() for n in state]).norm()))
    assert moved[0] > 0.02
    assert moved[1] == pytest.approx(0.01, rel=1e-3)
    assert list((tmp_path / "0").glob("*.safetensors"))
