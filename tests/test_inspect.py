"""hfl inspect, and models and data that do not fit a run: groups, costs, refusals in one sentence."""

from __future__ import annotations

import json
import os

import pytest

from hetfl.cli.main import main

QUICK = ["--extract", "heterofl", "--aggregate", "overlap", "--limit", "200", "--clients", "3", "--rounds", "2", "--epochs", "1",
         "--pretrain-steps", "3"]  # fmt: skip


def hfl(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    out = capsys.readouterr()
    return ended.value.code, " ".join(out.out.split()), " ".join(out.err.split())


@pytest.fixture
def nets(monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))


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
    assert "lstm for 1x20x3, 7 classes: 1 width groups" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["resnt18"], "unknown model 'resnt18'; did you mean 'resnet18'?"),
        (["cnn", "--levels", "1,2"], "--levels takes width ratios in (0, 1] such as 1,0.5,0.25, not '1,2'"),
        (["cnn", "--input", "3xa"], "--input takes the shape of one example such as 3x32x32 or 128, not '3xa'"),
        (["cnn", "--heads", "hole"], "--heads: should be 'width' or 'whole' (got 'hole')"),
        (
            ["cnn", "--model-args", "depth=3"],
            "unknown model argument 'depth'; did you mean 'widths'? (known: classes, channels, widths)",
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


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--model", "held_out_nets:NoWidth"], "no width of this model can be cut"),
        (["--model", "held_out_nets:thousand"], "logits of shape (2, 10) are needed"),
        (["--model", "held_out_nets:coloured"], "expected input[2, 1, 8, 8] to have 3 channels, but got 1 channels instead"),
        (["--dataset", "harbox"], "data set 'harbox' cannot be downloaded: give its folder"),
        (["--norm-policy", "frozen"], "--norm-policy: should be 'auto', 'aggregate', 'local', 'static'"),
        (["--mean", "1,2"], "--mean has 2 values, but the inputs have 1 channels"),
        (["--partition", "quantity", "--clients", "150"], "are too few for 150 clients of at least 2: lower --clients"),
    ],
)
def test_models_and_data_that_do_not_fit_are_refused(nets, capsys, tmp_path, words, sentence):
    code, _, error = hfl(capsys, "run", *QUICK, "--out", tmp_path / "a", *words)
    assert code == 2
    assert sentence in error
    assert "Traceback" not in error


def test_a_model_that_answers_with_an_object_is_reduced_to_its_logits(nets, capsys, tmp_path):
    code, _, error = hfl(capsys, "run", *QUICK, "--model", "held_out_nets:Aux", "--out", tmp_path / "a")
    assert (code, error) == (0, "")
    assert json.loads((tmp_path / "a" / "run.json").read_text())["widths"] == {"net.a": 16}
