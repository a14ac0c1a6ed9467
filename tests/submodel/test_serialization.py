"""Width groups as JSON."""

from __future__ import annotations

import json

import pytest

from hetfl.config import resolve
from hetfl.rounds import setup
from hetfl.rounds.reporting import NoCallback
from hetfl.submodel import serialization


@pytest.mark.parametrize(
    ("name", "args"),
    [("fedconv-cnn", {}), ("resnet18", {"shrink": 8}), ("mobilenetv2", {"shrink": 4}), ("lstm", {}), ("encoder", {"width": 16})],
)
def test_width_groups_travel_as_json_and_nodes_build_no_whole_model(name, args):
    text = name in ("lstm", "encoder")
    options = resolve({"dataset": "digits", "model": name if not text else "mlp", "limit": 60, "clients": 2})
    common = setup.build_setup(options, NoCallback())
    plain = json.loads(json.dumps(serialization.to_json(common.builder.widths)))
    widths = serialization.from_json(plain)
    assert serialization.to_json(widths) == serialization.to_json(common.builder.widths)
    there = setup.build_node_setup(options, common.federation, widths)
    assert all(p.is_meta for p in there.builder.model.parameters())
    kept = widths.prefix(0.5)
    sizes = {name: len(units) for name, units in kept.items()}
    ours, theirs = common.builder.module(sizes), there.builder.module(sizes)
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    assert repr(ours) == repr(theirs)
    first, again = common.builder.initial(sizes), there.builder.initial(sizes)
    assert all((first[n] == again[n]).all() for n in first)
