"""What is shown and listed: runs, plugins, presets, models, machines."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.cli import exit_code, hfl
from hetfl import config, presets, registry
from hetfl.cli.console import console
from hetfl.config import read_run_file, resolve


def test_show_prints_the_summary_again(finished, capsys):
    code, out, _ = hfl(capsys, "show", finished)
    assert code == 0
    assert "heterofl x overlap on digits" in out
    assert "global@test" in out
    assert "control@test" in out


def test_show_of_other_folders(tmp_path, capsys):
    words = ["--extract", "heterofl", "--seeds", 1, "--limit", 120, "--clients", 2, "--rounds", 1, "--epochs", 1]
    assert hfl(capsys, "matrix", *words, "--model", "mlp", "--server-data", "0", "--out", tmp_path / "m")[0] in (0, 1)
    code, out, _ = hfl(capsys, "show", tmp_path / "m")
    assert code == 0
    assert "global@test, %, mean ± standard deviation over seeds" in out
    assert "heterofl overlap" in out
    assert "not applicable" in out
    (tmp_path / "empty").mkdir()
    code, _, err = hfl(capsys, "show", tmp_path / "empty")
    assert (code, "is no folder of a run or matrix" in err) == (2, True)


def test_list_and_show_plugins(capsys):
    code, out, _ = hfl(capsys, "list-plugins")
    assert code == 0
    for name in ("fedconv", "heterofl", "fedrolex", "full", "fedavg", "overlap", "kld", "levels"):
        assert name in out
    code, out, _ = hfl(capsys, "show", "fedconv")
    assert code == 0
    assert "fedconv.temperature" in out


def test_listing_imports_nothing_heavy():
    code = (
        "import sys\nfrom hetfl.cli.main import main\n"
        "try:\n    main(['list-plugins'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = [m for m in sys.modules if m in ('torch', 'flwr', 'datasets', 'numpy') or m.startswith('hetfl.plugins.')]\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stderr


def test_presets_are_listed_and_shown(capsys):
    code, out, _ = hfl(capsys, "presets")
    assert code == 0
    assert "heterofl/cifar10-iid-a-e" in out
    code, out, _ = hfl(capsys, "presets", "fiarse/cifar10-four")
    assert 'extract = "fiarse"' in out
    assert "# unlike the paper" in hfl(capsys, "presets", "hermes/cifar10")[1]
    assert hfl(capsys, "presets", "fiarse/cifar10-fuor")[0] == 2


def test_a_preset_is_printed_as_a_run_file(tmp_path, capsys):
    assert exit_code("presets", "heterofl/mnist-iid-a") == 0
    (tmp_path / "run.toml").write_text(capsys.readouterr().out)
    values, preset = read_run_file(tmp_path / "run.toml"), presets.find_preset("heterofl/mnist-iid-a")
    assert values == {"preset": preset.name, **preset.values}
    assert resolve(values) == resolve(config.merge_options(preset.values, {"preset": preset.name}))


@pytest.mark.parametrize(
    "words", [["plugins"], ["presets"], ["show", "fedconv"], ["show", "kld"], ["presets", "fiarse/cifar10-four"]]
)
def test_no_word_is_broken_at_80_columns(words, capsys, monkeypatch):
    def printed(width):
        monkeypatch.setattr(console, "width", width)
        assert exit_code(*words) == 0
        return capsys.readouterr().out

    narrow, wide = printed(80), printed(250)
    if words[0] != "presets" or len(words) == 1:
        assert max(map(len, narrow.splitlines())) <= 80
    assert set(narrow.split()) - set(wide.split()) == set(), "a piece of a word"


def test_the_list_of_plugins_has_about_a_line_each(capsys, monkeypatch):
    monkeypatch.setattr(console, "width", 80)
    assert exit_code("plugins") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 1.5 * len(registry.entries()) + 6


def test_profile_says_what_this_machine_affords(capsys):
    code, out, _ = hfl(capsys, "profile", "mlp", "--dataset", "digits", "--levels", "1,0.5", "--steps", "10")
    assert code == 0
    assert "this machine affords width 1" in out
    code, out, _ = hfl(capsys, "profile", "mlp", "--dataset", "digits", "--levels", "1,0.5", "--deadline", "0")
    assert "affords no width of it; width 0.5 is too much: it takes " in out
    assert "s, the deadline is 0 s" in out
    code, _, err = hfl(capsys, "profile", "mpl", "--dataset", "digits")
    assert code == 2
    assert "did you mean 'mlp'?" in err


def test_inspect_shows_groups_frozen_and_what_levels_cost(capsys):
    code, out, _ = hfl(capsys, "inspect", "cnn", "--dataset", "mnist", "--levels", "1,0.5,0.25,0.125,0.0625")
    assert code == 0
    for shown in ("cnn for 1x28x28, 10 classes: 4 width groups", "1,556,874", "391,370", "98,922", "25,274", "6,594", "6.24 MB"):
        assert shown in out
    assert "17.bias the model's output" in out


def test_inspect_builds_for_text_and_for_given_shapes(capsys):
    code, out, _ = hfl(capsys, "inspect", "encoder", "--model-args", "width=32", "--model-args", "layers=1", "--levels", "0.5")
    assert code == 0
    assert "encoder for 8192 token ids, 4 classes" in out
    code, out, _ = hfl(capsys, "inspect", "lstm", "--input", "1x20x3", "--classes", "7")
    assert code == 0
    assert "lstm for 1x20x3, 7 classes: 1 width group," in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["resnt18"], "unknown model 'resnt18'; did you mean 'resnet18'?"),
        (["cnn", "--levels", "1,2"], "--levels takes width ratios in (0, 1] such as 1,0.5,0.25, not '1,2'"),
        (["cnn", "--input", "3xa"], "--input takes the shape of one example such as 3x32x32 or 128, not '3xa'"),
        (["cnn", "--heads", "hole"], "--heads: should be 'width' or 'whole' (got 'hole')"),
        (
            ["cnn", "--model-args", "depth=3"],
            "unknown model argument 'depth' (known: classes, channels, widths)",
        ),
        (
            ["encoder", "--dataset", "mnist"],
            "model 'encoder' needs 'vocab', so it takes text, but the inputs are arrays of 1x28x28: choose",
        ),
        (
            ["cnn", "--dataset", "ag_news"],
            "model 'cnn' needs 'channels', so it takes pictures or arrays, but the inputs are text: choose",
        ),
        (["held_out_nets:Two"], "the model's forward needs 2 inputs (x, lengths) but gets only the examples: wrap it in a module"),
        (["held_out_nets:coloured", "--dataset", "digits"], "the model does not run on inputs of shape (2, 1, 8, 8)"),
        (["nothing.here:Net"], "model module 'nothing.here' cannot be imported"),
        (["held_out_nets:Tow"], "module 'held_out_nets' has no factory 'Tow'; did you mean 'Two'?"),
    ],
)
def test_inspect_refuses_in_one_sentence(nets, capsys, words, sentence):
    code, _, error = hfl(capsys, "inspect", *words)
    assert code == 2
    assert sentence in error
    assert "Traceback" not in error


def test_inspect_lists_the_residual_blocks(capsys):
    code, out, _ = hfl(
        capsys, "inspect", "preresnet18", "--input", "1x8x8", "--model-args", "widths=[4,8]", "--model-args", "blocks=[2,1]"
    )
    assert code == 0
    assert "may be left out: 1, 2" in out


def test_inspect_puts_the_axes_side_by_side(capsys):
    words = ["inspect", "cnn", "--input", "1x8x8", "--model-args", "widths=[4,8]", "--levels", "1,0.5", "--batch-size", "4"]
    code, out, _ = hfl(capsys, *words, "--adapter", "lora:rank=8,target=conv", "--axis", "width,rank")
    assert code == 0
    assert ("(100.0%)" in out, "rank" in out, "training memory" in out) == (True, True, True)
    words[words.index("1,0.5")] = "0.5"
    code, out, _ = hfl(capsys, *words, "--axis", "width")
    assert (code, out.count("(100.0%)")) == (0, 3), "shares are of the whole model, asked for or not"
    code, _, error = hfl(capsys, *words, "--axis", "rank")
    assert (code, "no adapters whose ranks could be cut" in error) == (2, True)
    code, _, error = hfl(capsys, *words, "--axis", "widht")
    assert (code, "did you mean 'width'" in error) == (2, True)
