"""What a client keeps on its own disk."""

from __future__ import annotations

import os

import pytest
import torch

from hetfl.engines.flower.client_state import ClientStateStore, StateLostError


@pytest.mark.parametrize("every", [1, 6, 10])
def test_a_server_that_goes_back_to_a_checkpoint_finds_what_the_client_knew_then(tmp_path, every):
    store, keep = ClientStateStore(tmp_path, every, 2), 2
    for round in range(1, 30):
        store.save(round, round - 1, {"memory": {"x": torch.tensor(round)}})
        for checkpoint in range((round - 1) // every * every, 0, -every)[:keep]:
            assert store.load(checkpoint)["memory"]["x"] == checkpoint
    assert len(list(tmp_path.iterdir())) <= 5 + 4 * keep
    with pytest.raises(StateLostError, match="memory of round 3 is not there"):
        store.load(3)


def test_a_server_without_checkpoints_has_the_last_rounds(tmp_path):
    store = ClientStateStore(tmp_path, 0, 2)
    for round in range(1, 9):
        store.save(round, round - 1, {})
    assert sorted(path.stem for path in tmp_path.iterdir()) == [f"{round:06d}" for round in range(4, 9)]


@pytest.mark.skipif(os.name != "posix", reason="modes are for posix")
def test_nobody_else_can_read_what_a_client_remembers(tmp_path):
    ClientStateStore(tmp_path, 1, 2).save(1, 0, {})
    assert (tmp_path / "000001.safetensors").stat().st_mode & 0o077 == 0
