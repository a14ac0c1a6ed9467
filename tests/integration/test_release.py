"""What a release says of itself: one version, its commit, its parts; and that none of its files tells a secret."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from importlib.metadata import version

import torch

import hetfl
from helpers.paths import ROOT
from helpers.runs import FOUR_CLIENTS
from hetfl.cli.show import find_commit
from hetfl.config import resolve
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import runner
from hetfl.runs.checkpoint import Checkpoints, Snapshot
from hetfl.runs.folder import RunFolder


def test_there_is_one_version():
    assert hetfl.__version__ == version("hetfl")
    assert f"version: {hetfl.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    assert re.fullmatch(r"\d+\.\d+", hetfl.API)


def test_a_checkout_says_its_commit_and_an_installation_none(tmp_path):
    assert find_commit(tmp_path) == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "x").write_text("1")
    subprocess.run([*git, "add", "x"], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    assert re.fullmatch(r"[0-9a-f]{10}", find_commit(tmp_path))
    (tmp_path / "x").write_text("2")
    assert find_commit(tmp_path).endswith("+")


def test_the_bill_of_materials_lists_what_is_needed_with_licences():
    done = subprocess.run([sys.executable, str(ROOT / ".ci" / "sbom.py"), "ray"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    parts = {part["name"]: part for part in found["components"]}
    assert found["metadata"]["component"]["name"] == "hetfl"
    assert {"torch", "flwr", "pluggy", "ray", "numpy"} <= parts.keys()
    assert parts["torch"]["version"] == version("torch")
    assert parts["pluggy"]["licenses"][0]["license"]["name"]


def test_a_run_folder_tells_no_secret_and_what_is_secret_is_its_owners(tmp_path, monkeypatch):
    """Neither a token of the environment nor the server's key stands anywhere but in the checkpoint, which has mode 600."""
    monkeypatch.setenv("WANDB_API_KEY", "tell-nobody-1234")
    options = resolve({**FOUR_CLIENTS, "rounds": 1, "extract": "full", "wrap": ("dp",), "set": {"dp": {"noise": 1.0}}})
    runner.run(options, RunFolder(tmp_path / "r").open(), NoCallback())
    snapshot = Checkpoints(tmp_path / "r" / "checkpoints").load(print)
    key = bytes(snapshot.tensors["secret"]["key"].tolist())
    assert len(key) >= 16
    for path in (p for p in (tmp_path / "r").rglob("*") if p.is_file()):
        data = path.read_bytes()
        assert b"tell-nobody" not in data
        if path.parent.name in ("objects", "copies"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        else:
            assert key not in data
            assert key.hex().encode() not in data


def test_a_mended_part_is_its_owners_too(tmp_path):
    made = Checkpoints(tmp_path)
    secret = {"key": torch.arange(32)}
    for round in (1, 2):
        made.save(Snapshot(round, {"secret": secret}, {}))
    (copy,) = (tmp_path / "copies").iterdir()
    part = tmp_path / "objects" / copy.name
    part.write_bytes(b"torn")
    part.chmod(0o644)
    assert Checkpoints(tmp_path).load(print) is not None
    assert stat.S_IMODE(part.stat().st_mode) == 0o600
