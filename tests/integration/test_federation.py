"""Real federations on this machine: SuperLink, SuperNodes, certificates and keys; the bits of the local engine, nodes that fail.

A federation takes a quarter of a minute to begin, so these tests share one, in this order; test_gallery.py runs `hfl federate`.
"""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.paths import REAL
from helpers.runs import THREE_NODES
from hetfl.config import resolve
from hetfl.engines.flower.export import export
from hetfl.engines.flower.superlink import LocalFederation, end, make_key
from hetfl.engines.select import KEYS
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import runner
from hetfl.runs.folder import RunFolder


class WithoutOne(LocalFederation):
    """A federation whose node 1 comes later."""

    late = False

    def join(self, node, name=None):
        if node != 1 or name or self.late:
            super().join(node, name)

    def complete(self):
        if not self.late:
            self.late = True
            self.join(1)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    home = tmp_path_factory.mktemp("federation") / "flower"
    with WithoutOne(home, 3, tls=True) as found:
        yield found
    until = time.monotonic() + 10
    while (left := list_processes(home)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left, "a federation that is stopped leaves no process behind"


def list_processes(home):
    """The command lines of processes that name the folder of a federation."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [line] if str(home) in (line := path.read_text()) and int(path.parent.name) != os.getpid() else []
    return found


def begin(place, federation, **values):
    """An app, and the events of its run in the folder `place`."""
    folder = RunFolder(place).open()
    folder.json(KEYS, federation.keys())
    folder.commit()
    folder.release()
    home = export(resolve({**THREE_NODES, **values, "engine": "flower"}), place.with_name(f"{place.name} app"))
    for event in federation.events(home, place):
        assert "failed" not in event, event
        yield event


def rows_of(place):
    with open(place / "clients.csv", newline="") as file:
        return [{"fault": "", **row} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_strangers_and_impostors_are_not_heard_and_change_no_bit(tmp_path, federation):
    """The stranger has a key that the SuperLink does not know, the rogue one that it knows but that is not client 1's; the real
    node of client 1 comes last."""
    make_key(federation._home / "stranger")
    federation.register("rogue")
    federation.join(1, "rogue")
    federation.join(1, "stranger")
    values = {"extract": "hermes", "aggregate": "hermes", "rounds": 2, "eval_every": 2, "wait": 300.0}
    heard = []
    for event in begin(tmp_path / "there", federation, **values):
        heard += [event["alarm"]] if "alarm" in event else []
        federation.complete()
    assert any("claims to be client 1 is not heard: its key is not the one" in text for text in heard)
    assert not federation.running("stranger")
    assert "activate" in (federation._home / "stranger.log").read_text()
    runner.run(resolve({**THREE_NODES, **values}), RunFolder(tmp_path / "here").open(), NoCallback())
    here, there = (load_file(tmp_path / place / "weights.safetensors") for place in ("here", "there"))
    assert all(torch.equal(tensor, there[name]) for name, tensor in here.items())
    here, there = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(tmp_path / place)] for place in ("here", "there")
    )
    assert here == there
    end(federation._running.pop("rogue"), signal.SIGKILL)


@pytest.mark.slow
def test_a_federation_with_tls_and_keys_gives_the_bits_of_the_local_engine(tmp_path, stops, federation):
    federation.complete()
    data = REAL / "mnist" if (REAL / "mnist").is_dir() else "digits"
    values = {"extract": "fedconv", "aggregate": "kld", "rounds": 1, "dataset": str(data)}
    for _ in begin(tmp_path / "there", federation, **values):
        pass
    runner.run(resolve({**THREE_NODES, **values}), RunFolder(tmp_path / "here").open(), NoCallback())
    assert stops.equal(tmp_path / "here", tmp_path / "there")


@pytest.mark.slow
def test_a_node_that_hangs_and_one_that_is_killed_come_back_while_the_others_go_on(tmp_path, federation):
    """fedbuff merges two replies of three as they arrive. Node 2 is frozen for some merges and goes on where it stood; node 1 is
    killed then, and begins anew when the SuperLink has noticed: both have their memory. (Begun before, it would do the task that it
    was sent, and nobody would have noticed.)"""
    values = {"extract": "lgfedavg", "rounds": 200, "eval_every": 200, "schedule": "fedbuff", "buffer": 2}
    federation.complete()
    frozen = thawed = killed = done = 0
    tried = 0.0
    for event in begin(tmp_path / "out", federation, **values):
        if "done" in event:
            done = event["done"]["round"]
        people = rows_of(tmp_path / "out") if done else []
        if done and not frozen:
            os.killpg(federation._running["node2"].pid, signal.SIGSTOP)
            frozen = done
        if frozen and not thawed and done >= frozen + 3:
            os.killpg(federation._running["node2"].pid, signal.SIGCONT)
            thawed = done
        back = [row for row in people if thawed and row["client"] == "2" and int(row["round"]) > thawed and not row["fault"]]
        if back and not killed:
            federation.leave(1)
            killed, tried = done, time.monotonic()
        gone = [int(row["round"]) for row in people if row["client"] == "1" and row["fault"]]
        if gone and not federation.running("node1") and time.monotonic() - tried > 10:
            federation.join(1)
            tried = time.monotonic()
        again = [row for row in people if gone and row["client"] == "1" and int(row["round"]) > gone[0] and not row["fault"]]
        if again:
            break
    assert again, "node 1 is back"
    while_frozen = [row for row in people if frozen + 1 < int(row["round"]) <= thawed]
    assert {row["client"] for row in while_frozen if not row["fault"]} == {"0", "1"}
    faults = [row["fault"] for row in people if row["client"] == "2" and row["fault"]]
    taken_for_gone = all("Unavailable" in fault or "not connected" in fault for fault in faults)  # after a minute
    assert taken_for_gone, faults
    assert faults or int(back[0]["staleness"]) >= 2
    assert gone
    assert gone[0] > killed
    assert not any("memory of round" in row["fault"] for row in people)
    assert list((federation._home / "memory").rglob("1/*.safetensors"))
