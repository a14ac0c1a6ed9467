"""Checkpoints: whole or not at all, damage seen, the one before used."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from hetfl.errors import RunError
from hetfl.runs.checkpoint import Checkpoints, Snapshot


def test_only_the_last_checkpoints_stay(stopped):
    assert len(list((stopped / "part" / "checkpoints").glob("round-*.json"))) == 2
    needed = {
        part
        for path in (stopped / "part" / "checkpoints").glob("round-*.json")
        for kind in ("tensors", "facts")
        for part in json.loads(path.read_text())["body"][kind].values()
    }
    assert {path.stem for path in (stopped / "part" / "checkpoints" / "objects").iterdir()} == needed


def newest(path):
    return sorted((path / "part" / "checkpoints").glob("round-*.json"))[-1]


@pytest.mark.parametrize("damage", ["torn list", "tampered list", "torn part", "tampered part", "missing part", "draft left"])
def test_a_damaged_checkpoint_is_seen_and_the_one_before_is_used(stopped, stops, damage):
    path = newest(stopped)
    body = json.loads(path.read_text())["body"]
    part = path.parent / "objects" / f"{body['tensors']['server']}.safetensors"
    if damage == "torn list":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "tampered list":
        path.write_text(path.read_text().replace('"round": 3', '"round": 2'))
    elif damage == "torn part":
        part.write_bytes(part.read_bytes()[:-4])
    elif damage == "tampered part":
        part.write_bytes(part.read_bytes()[:-1] + b"\x07")
    elif damage == "missing part":
        part.unlink()
    else:
        (path.parent / ".round-000009.json.part").write_text("{")
    watch = stops.go_on(stopped / "part")
    damaged = damage != "draft left"
    assert any(f"after round {2 if damaged else 3}" in note for note in watch.notes)
    assert any("damaged" in note and "going back to the one before" in note for note in watch.notes) == damaged
    assert stops.equal(stopped / "whole", stopped / "part")


def test_a_run_without_a_whole_checkpoint_begins_from_its_config(stopped, stops):
    shutil.rmtree(stopped / "part" / "checkpoints")
    watch = stops.go_on(stopped / "part")
    assert any("begins anew" in note for note in watch.notes)
    assert stops.equal(stopped / "whole", stopped / "part")


def test_a_full_disk_leaves_the_last_good_state(tmp_path, monkeypatch):
    store = Checkpoints(tmp_path, 2)
    store.save(Snapshot(1, {"server": {"w": torch.ones(3)}}, {"server": {}}))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hetfl.files.os.fsync", full)
    with pytest.raises(RunError, match=r"No space left on device.*the one before is intact.*hfl resume"):
        store.save(Snapshot(2, {"server": {"w": torch.zeros(3)}}, {"server": {}}))
    monkeypatch.undo()
    found = Checkpoints(tmp_path, 2).load(print)
    assert found.round == 1
    assert found.tensors["server"]["w"].tolist() == [1, 1, 1]
    assert not list(tmp_path.rglob("*.part"))


def test_tensors_come_back_in_their_order_and_kind(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    group = {
        "z": base[:, 1:3],
        "a": base,
        "c": torch.tensor(3),
        "b": torch.tensor([True]),
        "y": base.expand(2, 3, 4),
        "0:1": base[0:0],
    }
    Checkpoints(tmp_path).save(Snapshot(1, {"g": group}))
    back = Checkpoints(tmp_path).load(print).tensors["g"]
    assert list(back) == list(group)
    assert all(torch.equal(back[n], group[n]) and back[n].dtype == group[n].dtype for n in group)


def test_what_changes_in_place_is_written_again(tmp_path):
    store, weights = Checkpoints(tmp_path), torch.ones(3)
    store.save(Snapshot(1, {"g": {"w": weights}}))
    weights.add_(1)
    store.save(Snapshot(2, {"g": {"w": weights}}))
    assert Checkpoints(tmp_path).load(print).tensors["g"]["w"].tolist() == [2, 2, 2]
