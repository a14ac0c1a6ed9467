"""A node with data of its own."""

from __future__ import annotations

import json

import numpy as np
import torch
from flwr.app import Message

from helpers.runs import THREE_NODES
from hetfl.config import resolve
from hetfl.engines import node as remote
from hetfl.engines.flower.client_app import client_app
from hetfl.engines.flower.export import export
from hetfl.engines.flower_internals import identify, number
from hetfl.engines.local import context, node
from hetfl.rounds import setup
from hetfl.rounds.messages import Instruction
from hetfl.rounds.records import RecordCodec
from hetfl.rounds.reporting import NoCallback


def test_a_node_trains_on_its_own_data(tmp_path):
    """The whole way of a training message on a node whose config names a folder of its own."""
    random = np.random.default_rng(0)
    (tmp_path / "mine").mkdir()
    for part, count in (("train", 40), ("test", 10)):
        x = random.integers(0, 255, (count, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / "mine" / f"{part}.npz", x=x, y=np.arange(count) % 10)
    options = resolve({**THREE_NODES, "extract": "heterofl", "dataset": str(tmp_path / "mine"), "server_data": 0, "model": "mlp"})
    folder = export(options, tmp_path / "app") / "hetfl_app"
    outline = json.loads((folder / "outline.json").read_text())
    outline["classes"].append("another")
    identify(1)
    app = client_app(folder)
    made = setup.build_setup(options, NoCallback())
    state = made.builder.initial()
    message = Message(RecordCodec().seal(Instruction(1, state, dict(made.builder.full))), node(2), "train", group_id="1")
    number(message, "m")
    there = context(2, 3)
    there.node_config.update({"data": str(tmp_path / "mine"), "memory": str(tmp_path / "memory")})
    reply = app(message, there)
    assert not reply.has_error(), reply.error.reason
    found = RecordCodec().open(reply.content)
    assert found.examples == 36
    assert any(not torch.equal(found.state[n], state[n]) for n in state)
    assert list((tmp_path / "memory").rglob("2/000001.safetensors"))
    (folder / "outline.json").write_text(json.dumps(outline))
    remote.site.cache_clear()
    refused = client_app(folder)(message, there)
    assert "have the classes" in refused.error.reason
    message.content.config_records["config"]["model"] = "os:system"
    assert "no module is imported because a message names it" in app(message, there).error.reason
