"""A real federation on this machine: SuperLink, SuperNodes, certificates and keys; the bits of the local engine."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from typer.testing import CliRunner

from hetfl.cli.main import app, main
from hetfl.config import read_run_file, resolve
from hetfl.engines import node as remote
from hetfl.engines.flower.client_app import client_app, is_allowed, refuse_not_allowed
from hetfl.engines.flower.export import export
from hetfl.engines.flower.superlink import LocalFederation, make_key
from hetfl.engines.flower_internals import identify, number
from hetfl.engines.local import context, node
from hetfl.errors import UsageError
from hetfl.rounds import setup
from hetfl.rounds.messages import Instruction
from hetfl.rounds.records import RecordCodec
from hetfl.rounds.reporting import NoCallback
from hetfl.runs.folder import RunFolder
from hetfl.submodel import serialization

MNIST = Path(os.environ.get("HETFL_DATA", "../shared/data")) / "mnist"

SMALL = {"limit": 300, "rounds": 3, "epochs": 1, "pretrain_steps": 20, "levels": "1,0.5,0.25", "clients": 3, "vmap": "off"}


def words(values):
    return [w for k, v in values.items() if k != "clients" for w in ("--" + k.replace("_", "-"), str(v))]


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


def test_an_exported_app_is_small_and_holds_no_package(tmp_path):
    folder = export(resolve({**SMALL, "extract": "fedconv"}), tmp_path / "app")
    assert sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 100_000
    project = read_run_file(folder / "pyproject.toml")
    assert project["project"]["dependencies"] == ["flwr>=1.41.0"]
    assert read_run_file(folder / "hetfl_app" / "run.toml")["aggregate"] == "kld"
    for half in ("server_app", "client_app"):
        assert len((folder / "hetfl_app" / f"{half}.py").read_text().splitlines()) < 10


def test_a_users_own_model_travels_inside_the_app(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mynet.py").write_text(
        "from torch import nn\n\n\ndef make(classes, channels, size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, 8), nn.ReLU(), nn.Linear(8, classes))\n"
    )
    folder = export(resolve({**SMALL, "extract": "heterofl", "model": "mynet:make"}), tmp_path / "app")
    assert (folder / "hetfl_app" / "mynet.py").exists()
    assert is_allowed("mynet:make", [], folder / "hetfl_app")
    assert not is_allowed("os:system", [], folder / "hetfl_app")
    assert not is_allowed("timm:resnet18", [], folder / "hetfl_app")
    assert is_allowed("timm:resnet18", ["timm"], folder / "hetfl_app")
    assert is_allowed("resnet18", [], folder / "hetfl_app")
    with pytest.raises(UsageError, match="does not allow the model"):
        refuse_not_allowed(resolve({"model": "elsewhere:make"}), [], folder / "hetfl_app")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["export", "flower", "APP", "--extract", "fedcnv"], "did you mean 'fedconv'"),
        (["export", "flower", "APP", "--client-mod", "localdp"], "did you mean 'LocalDpMod'"),
        (["federate", "--nodes", "3", "--clients", "5"], "every node is a client"),
        (["run", "--engine", "flower"], "hfl federate"),
    ],
)
def test_what_cannot_be_taken_elsewhere_is_said(tmp_path, capsys, given, said):
    given = [str(tmp_path / "app") if word == "APP" else word for word in given]
    with pytest.raises(SystemExit) as ended:
        main([*given, *([] if given[0] == "export" else ["--out", str(tmp_path / "out")]), "--limit", "60"])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def federated(path, values, *more):
    result = CliRunner().invoke(app, ["federate", "--nodes", "3", "--tls", "--out", str(path), *words(values), *more])
    assert result.exit_code == 0, result.output + str(result.exception)
    return path


def alone(path, values):
    result = CliRunner().invoke(app, ["run", "--clients", "3", "--out", str(path), *words(values)])
    assert result.exit_code == 0, result.output
    return path


@pytest.mark.slow
@pytest.mark.parametrize("pair", [("fedconv", "kld"), ("fiarse", "overlap"), ("hermes", "hermes")])
def test_a_federation_with_tls_and_keys_gives_the_bits_of_the_local_engine(tmp_path, stops, pair):
    if not MNIST.is_dir():
        pytest.skip("no mnist here (HETFL_DATA)")
    values = {**SMALL, "extract": pair[0], "aggregate": pair[1], "dataset": MNIST, "eval_every": 3}
    assert stops.equal(alone(tmp_path / "here", values), federated(tmp_path / "there", values))


@pytest.mark.slow
def test_a_node_comes_back_with_its_memory_and_a_stranger_is_refused(tmp_path):
    options = resolve({**SMALL, "rounds": 5, "extract": "lgfedavg", "engine": "flower", "timeout": 60, "eval_every": 5})
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


def test_a_node_trains_on_its_own_data(tmp_path):
    """The whole way of a training message on a node whose config names a folder of its own."""
    random = np.random.default_rng(0)
    (tmp_path / "mine").mkdir()
    for part, count in (("train", 40), ("test", 10)):
        x = random.integers(0, 255, (count, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / "mine" / f"{part}.npz", x=x, y=np.arange(count) % 10)
    options = resolve({**SMALL, "extract": "heterofl", "dataset": str(tmp_path / "mine"), "server_data": 0, "model": "mlp"})
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
