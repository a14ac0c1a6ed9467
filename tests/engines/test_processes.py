"""Clients in processes."""

from __future__ import annotations

import pytest
import torch

from helpers.runs import FOUR_CLIENTS, play
from hetfl.config import resolve
from hetfl.engines.pickling import map_packed, pack_based, unpack
from hetfl.engines.processes import share_base, to_bytes
from hetfl.models.frozen import base_hash, freeze, frozen
from hetfl.submodel.builder import SubmodelBuilder
from hetfl.submodel.widths import Widths


@pytest.mark.slow
def test_a_process_that_dies_takes_no_more_than_its_client_with_it():
    options = {**FOUR_CLIENTS, "extract": "heterofl", "engine": "processes", "workers": 2, "wrap": ["helpers.deadly:Deadly"]}
    made = play(resolve(options))
    faults = [(row["round"], row["client"], row["fault"]) for row in made.state.client_rows if "fault" in row]
    assert faults == [(1, 1, "the client's process ended before it answered")]
    assert [row["left out"] for row in made.state.rows] == [1, 0]


def test_a_view_travels_as_its_own_entries_alone():
    whole = torch.zeros(1000, 1000)
    assert len(to_bytes(whole[:2, :2])) < 1000
    assert len(to_bytes({"x": [whole[:, :1]]})) < 10_000


class Net(torch.nn.Module):
    """A convolution in channels last and a layer whose weight another has too, all frozen but the head."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.pool = torch.nn.Conv2d(3, 64, 3), torch.nn.Linear(160, 160), torch.nn.MaxPool2d(2)
        self.second, self.head = torch.nn.Linear(160, 160), torch.nn.Linear(160, 200)
        self.second.weight = self.first.weight
        self.requires_grad_(False).head.requires_grad_(True)


def test_a_frozen_base_lies_in_a_file_for_all_processes(tmp_path):
    builder = SubmodelBuilder(freeze(Net()), Widths((), {}, {}))
    before = base_hash(builder.model)
    mapped, _ = share_base(builder, tmp_path / "model")
    there = SubmodelBuilder(unpack(map_packed(mapped)), builder.widths).model
    assert before == base_hash(builder.model) == base_hash(there)
    assert there.first.weight is there.second.weight
    assert there.head.weight.requires_grad
    assert there.conv.weight.is_contiguous(memory_format=torch.channels_last)
    (tmp_path / "model").write_bytes(bytes((tmp_path / "model").stat().st_size))
    for model in (builder.model, there):
        assert not any(t.any() for t in frozen(model).values() if t.nbytes > 1 << 16), "a copy of its own"


def test_a_model_that_cannot_be_pickled_is_built_by_every_process():
    net = Net()
    net.first.register_forward_hook(lambda *_: None)
    assert pack_based(freeze(net)) is None
    assert pack_based(torch.nn.Linear(2, 2)) is None
