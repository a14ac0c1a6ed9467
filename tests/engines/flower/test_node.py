"""A client as a node runs it."""

from __future__ import annotations

import pytest
import torch

from helpers.flower import context_of, message_for
from helpers.runs import FOUR_CLIENTS
from hetfl.config import format_run_file, resolve
from hetfl.engines.flower.manifest import make_mods
from hetfl.engines.flower.node import build_runtime, make_client_app
from hetfl.engines.flower.records import RecordCodec
from hetfl.rounds.messages import Instruction
from hetfl.rounds.reporting import NoCallback
from hetfl.runs.experiment import prepare


def test_flowers_client_mods_work_on_submodels(tmp_path):
    made = prepare(resolve({**FOUR_CLIENTS, "extract": "heterofl", "aggregate": "overlap", "levels": "0.5:1"}), NoCallback())
    plan = made.server.select(lambda size: torch.arange((size + 1) // 2))
    state, config = plan.take(made.server.state), format_run_file(made.options, made.plugins.options())
    moved = []
    for mods in ([], [["LocalDpMod", 0.01, 0.0, 8.0, 1e-5], ["message_size_mod"], ["arrays_size_mod"]]):
        message = message_for(0, RecordCodec().encode(Instruction(1, state, plan.sizes)), "train")
        app = make_client_app(lambda _: build_runtime(config), lambda _: tmp_path, make_mods(mods))
        reply = RecordCodec().decode(app(message, context_of(0, 4)).content)
        moved.append(float(torch.stack([(reply.state[n] - state[n]).norm() for n in state]).norm()))
    assert moved[0] > 0.02
    assert moved[1] == pytest.approx(0.01, rel=1e-3)
    assert list((tmp_path / "0").glob("*.safetensors"))
