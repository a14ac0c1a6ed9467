"""A real federation on this machine: SuperLink, SuperNodes, certificates and keys; the bits of the local engine."""

from __future__ import annotations

import csv
import time

import pytest
from typer.testing import CliRunner

from helpers.paths import REAL
from helpers.runs import THREE_NODES
from hetfl.cli.main import app
from hetfl.config import resolve
from hetfl.engines.flower.export import export
from hetfl.engines.flower.superlink import LocalFederation, make_key
from hetfl.engines.select import KEYS
from hetfl.runs.folder import RunFolder


def words(values):
    return [w for k, v in values.items() if k != "clients" for w in ("--" + k.replace("_", "-"), str(v))]


def alone(path, values):
    result = CliRunner().invoke(app, ["run", "--clients", "3", "--out", str(path), *words(values)])
    assert result.exit_code == 0, result.output
    return path


def federated(path, values, *more):
    result = CliRunner().invoke(app, ["federate", "--nodes", "3", "--tls", "--out", str(path), *words(values), *more])
    assert result.exit_code == 0, result.output + str(result.exception)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("fedconv", "kld"), ("hermes", "hermes")])
def test_a_federation_with_tls_and_keys_gives_the_bits_of_the_local_engine(tmp_path, stops, pair):
    if not (REAL / "mnist").is_dir():
        pytest.skip("no mnist here (HETFL_DATA)")
    values = {**THREE_NODES, "extract": pair[0], "aggregate": pair[1], "dataset": REAL / "mnist", "eval_every": 3}
    assert stops.equal(alone(tmp_path / "here", values), federated(tmp_path / "there", values))


@pytest.mark.slow
def test_a_node_comes_back_with_its_memory_and_a_stranger_is_refused(tmp_path):
    options = resolve({**THREE_NODES, "rounds": 5, "extract": "lgfedavg", "engine": "flower", "timeout": 60, "eval_every": 5})
    folder = RunFolder(tmp_path / "out").open()
    folder.release()
    home = export(options, tmp_path / "app")
    with LocalFederation(tmp_path / "flower", 3, tls=True) as federation:
        make_key(tmp_path / "flower" / "stranger")
        federation.join(1, "stranger")
        killed = again = 0.0
        for event in federation.events(home, tmp_path / "out"):
            assert "failed" not in event, event
            if "done" in event and event["done"]["round"] == 1:
                federation.leave(1)
                killed = time.monotonic()
            if killed and not federation.running("node1") and time.monotonic() - max(killed, again) > 10:
                federation.join(1)  # refused until the SuperLink has noticed that the old one is gone
                again = time.monotonic()
        assert not federation.running("stranger")
        assert "activate" in (tmp_path / "flower" / "stranger.log").read_text()
    with open(tmp_path / "out" / "clients.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["client"] == "1"]
    assert not rows[0]["fault"]
    assert not rows[-1]["fault"], rows
    assert any(row["fault"] for row in rows)
    assert not any("memory of round" in row["fault"] for row in rows)
    assert list((tmp_path / "flower" / "memory").rglob("1/*.safetensors"))
    until = time.monotonic() + 10
    while any(federation.running(name) for name in list(federation._running)) and time.monotonic() < until:
        time.sleep(0.2)
    assert not any(federation.running(name) for name in federation._running)


@pytest.mark.slow
def test_a_registered_node_cannot_be_another_client(tmp_path):
    """The rogue has a key that the SuperLink knows, and comes first; the real node of partition 1 comes later and is heard."""
    options = resolve({**THREE_NODES, "clients": 2, "levels": "1,0.5", "rounds": 2, "extract": "lgfedavg", "engine": "flower"})
    options = options.model_copy(update={"eval_every": 2, "wait": 100.0})
    folder = RunFolder(tmp_path / "out").open()
    folder.release()
    home = export(options, tmp_path / "app")
    federation = LocalFederation(tmp_path / "flower", 2, tls=True)
    with federation:
        folder.json(KEYS, federation.keys())
        federation.leave(1)
        federation.register("rogue")
        federation.join(1, "rogue")
        events, heard = list[dict](), list[str]()
        for event in federation.events(home, tmp_path / "out"):
            assert "failed" not in event, event
            events.append(event)
            heard += [event["alarm"]] if "alarm" in event else []
            if not federation.running("node1"):
                federation.join(1)
    assert any("claims to be client 1 is not heard: its key is not the one" in text for text in heard)
    with open(tmp_path / "out" / "clients.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["client"] == "1"]
    assert all("not connected" in row.get("fault", "not connected") for row in rows)
