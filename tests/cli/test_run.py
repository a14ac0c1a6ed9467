"""hfl run: what it leaves behind, from options to a run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pandas as pd
import pytest

from helpers.cli import QUICK, TINY, hfl
from hetfl.cli.main import main


def test_run_folder_holds_what_a_reader_needs(finished):
    names = {p.name for p in finished.iterdir()} - {".lock", ".hetfl", "checkpoints"}
    wanted = {"config.toml", "run.json", "metrics.csv", "clients.csv", "summary.json", "weights.safetensors"}
    pictures = {f"{name}.{form}" for name in ("curves", "partition") for form in ("png", "svg", "pdf")}
    assert wanted | pictures | {"partition.csv"} == names
    held = pd.read_csv(finished / "partition.csv")
    assert (held.drop(columns=["client", "all"]).sum(axis=1) == held["all"]).all()
    table = pd.read_csv(finished / "metrics.csv")
    assert table["round"].tolist() == [1, 2]
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["accuracy"]["global@test"]["last"] == pytest.approx(table["global@test"].iloc[-1])
    assert summary["bytes down"] == table["bytes down"].sum()
    assert (table["bytes down"] > 0).all()
    facts = json.loads((finished / "run.json").read_text())
    assert facts["versions"]["torch"]
    assert len(facts["initial weights sha256"]) == 64


def test_resolved_config_runs_again_to_the_same_bits(finished, tmp_path, capsys):
    code, _, _ = hfl(capsys, "run", finished / "config.toml", "--out", tmp_path / "b")
    assert code == 0
    assert (finished / "weights.safetensors").read_bytes() == (tmp_path / "b" / "weights.safetensors").read_bytes()
    first, second = (json.loads((p / "summary.json").read_text())["accuracy"] for p in (finished, tmp_path / "b"))
    assert first == second
    assert 'weighting = "samples"' in (tmp_path / "b" / "config.toml").read_text()


@pytest.mark.parametrize(
    "words",
    [
        ("--extract", "fedmd", "--aggregate", "fedmd", "--set", 'fedmd.models={"0.5":"mlp"}', "--levels", "1,0.5,0.5"),
        ("--extract", "hermes", "--aggregate", "hermes", "--profile", "budget", "--set", "budget.memory=400kB:1,100kB:2"),
        ("--extract", "fiarse", "--aggregate", "cluster", "--profile", "devices", "--set", "devices.fleet=tx2:1,nano:2"),
    ],
    ids=["own architectures", "budgets", "devices"],
)
def test_resolved_configs_of_other_strategies_run_again(tmp_path, capsys, words):
    code, _, _ = hfl(capsys, "run", *TINY, *words, "--out", tmp_path / "a")
    assert code == 0
    code, _, _ = hfl(capsys, "run", tmp_path / "a" / "config.toml", "--out", tmp_path / "b")
    assert code == 0
    first, second = (json.loads((tmp_path / p / "summary.json").read_text()) for p in "ab")
    assert first["weights sha256"] == second["weights sha256"]
    assert first["accuracy"] == second["accuracy"]


def test_options_from_a_run_file_yield_to_the_command_line(tmp_path, capsys):
    file = tmp_path / "experiment.toml"
    file.write_text('extract = "fedrolex"\naggregate = "overlap"\nrounds = 9\n[set.fedrolex]\nstep = 2\n')
    code, _, _ = hfl(capsys, "run", file, *TINY, "--rounds", 1, "--set", "fedrolex.direction=backward", "--out", tmp_path / "o")
    assert code == 0
    text = (tmp_path / "o" / "config.toml").read_text()
    assert "step = 2" in text
    assert 'direction = "backward"' in text
    assert "rounds = 1\n" in text


def test_preprocessing_is_part_of_the_resolved_config(finished):
    text = (finished / "config.toml").read_text()
    for line in ('input_column = "image"', 'label_column = "label"', 'model = "fedconv-cnn"', "4.8864", "6.0176"):
        assert line in text


def test_model_of_a_stranger(tmp_path, capsys, monkeypatch):
    (tmp_path / "strange.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes, in_channels):\n"
        "        super().__init__()\n"
        "        self.a = nn.Conv2d(in_channels, 8, 3, padding=1)\n"
        "        self.b = nn.Conv2d(8, 12, 1)\n"
        "        self.d = nn.Conv2d(20, 20, 3, padding=1, groups=20)\n"
        "        self.c = nn.Conv2d(20, 8, 1)\n"
        "        self.head = nn.Linear(8, num_classes)\n"
        "    def forward(self, x):\n"
        "        a = torch.relu(self.a(x))\n"
        "        y = torch.relu(self.d(torch.cat([a, self.b(a)], 1)))\n"
        "        return self.head((a + self.c(y)).mean((2, 3)))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for extract in ("heterofl", "fedrolex", "fedconv"):
        words = ["--extract", extract, "--aggregate", "overlap", *TINY, "--model", "strange:Net", "--out", tmp_path / extract]
        assert hfl(capsys, "run", *words)[0] == 0
        counts = [level["parameters"] for level in json.loads((tmp_path / extract / "summary.json").read_text())["levels"]]
        assert counts == sorted(counts, reverse=True)
        assert counts[-1] < counts[0]


def test_a_model_that_answers_with_an_object_is_reduced_to_its_logits(nets, capsys, tmp_path):
    code, _, error = hfl(capsys, "run", *QUICK, "--model", "held_out_nets:Aux", "--out", tmp_path / "a")
    assert (code, error) == (0, "")
    assert json.loads((tmp_path / "a" / "run.json").read_text())["widths"] == {"net.a": 16}


def test_a_folder_that_is_not_empty_is_kept(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("precious")
    code, _, err = hfl(capsys, "run", *QUICK, "--out", tmp_path)
    assert code == 2
    assert "--overwrite" in err
    code, _, err = hfl(capsys, "run", *QUICK, "--out", tmp_path, "--overwrite")
    assert code == 2
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_overwrite_replaces_a_run(finished, tmp_path, capsys):
    assert hfl(capsys, "run", *QUICK, "--out", tmp_path / "r")[0] == 0
    assert hfl(capsys, "run", *QUICK, "--out", tmp_path / "r")[0] == 2
    assert hfl(capsys, "run", *QUICK, "--rounds", 1, "--out", tmp_path / "r", "--overwrite")[0] == 0
    assert len(pd.read_csv(tmp_path / "r" / "metrics.csv")) == 1


def test_out_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    code, _, err = hfl(capsys, "run", *QUICK, "--out", tmp_path / "file" / "run")
    assert code == 2
    assert "cannot be written" in err


def test_a_full_disk_keeps_what_was_written(tmp_path, capsys, monkeypatch):
    from hetfl.runs.folder import RunFolder

    whole = RunFolder.write

    def write(self, name, content):
        if name == "weights.safetensors":
            from hetfl.errors import RunError

            raise RunError("no space left on device")
        whole(self, name, content)

    monkeypatch.setattr(RunFolder, "write", write)
    code, _, err = hfl(capsys, "run", *QUICK, "--out", tmp_path / "o")
    assert code == 1
    assert "no space left" in err
    assert len(pd.read_csv(tmp_path / "o" / "metrics.csv")) == 2


def test_a_failed_run_ends_with_1_and_debug_shows_where(tmp_path, capsys, monkeypatch):
    from hetfl.rounds import loop

    def broken(*_):
        raise ZeroDivisionError("boom")

    monkeypatch.setattr(loop, "run_round", broken)
    code, _, err = hfl(capsys, "run", *QUICK, "--out", tmp_path / "o")
    assert code == 1
    assert "ZeroDivisionError: boom" in err
    with pytest.raises(ZeroDivisionError):
        main(["run", *QUICK, "--out", str(tmp_path / "p"), "--debug"])


def test_a_device_that_affords_nothing_ends_the_run_with_a_sentence(tmp_path, capsys):
    words = ("--profile", "budget", "--set", "budget.memory=1kB", "--out", tmp_path / "a")
    code, _, err = hfl(capsys, "run", *QUICK, *words)
    assert code == 1
    assert "the profile of client 0: ValueError: even width 0.0625 is too much: memory" in err


def test_help_names_every_option():
    from hetfl.config import RunOptions, format_flag

    done = subprocess.run(
        [sys.executable, "-m", "hetfl.cli.main", "run", "--help"],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "240", "TERMINAL_WIDTH": "240"},
    )  # fmt: skip
    assert done.returncode == 0
    assert not [name for name in RunOptions.model_fields if format_flag(name) not in done.stdout]
