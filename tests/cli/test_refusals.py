"""Bad input is one sentence and exit code 2."""

from __future__ import annotations

import pytest

from helpers.cli import QUICK, exit_code, hfl


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--extract", "fedconvv"], "unknown extract plugin 'fedconvv'; did you mean 'fedconv'?"),
        (["--aggregate", "overlapp"], "did you mean 'overlap'?"),
        (["--set", "overlap.weighing=samples"], "unknown option 'overlap.weighing'; did you mean 'weighting'?"),
        (["--set", "fedrolex.step=2"], "no chosen plugin is named 'fedrolex'"),
        (["--set", "weighting"], "--set takes name=value"),
        (["--set", "epochs=3"], "options of plugins are given as plugin.option=value; --epochs 3 is an option of the run"),
        (["--set", "weighting=true"], "'weighting=True' names no plugin: options of plugins are given as plugin.option=value"),
        (["--dataset", "mnists"], "mnist"),
        (["--model", "cnnn"], "did you mean 'cnn'?"),
        (["--model", "no_such_module:f"], "cannot be imported"),
        (["--levels", "1:2,1.5:3"], "outside (0, 1]"),
        (["--levels", "1:2,zero:3"], "'zero' is no ratio, such as"),
        (["--alpha", "-1"], "--alpha"),
        (["--rounds", "x"], "--rounds"),
        (["--partition", "dirichlett"], "--partition"),
        (["--clients", "5000"], "5000"),
        (["--roundz", "3"], "--roundz"),
        (["--extract", "fedconv", "--server-data", "0"], "needs public data"),
        (["--model-args", "widhts=[3]"], "did you mean 'widths'?"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(words, said, tmp_path, capsys):
    out = tmp_path / "o"
    code, _, err = hfl(capsys, "run", *QUICK, *words, "--out", out)
    assert code == 2, err
    assert said in err
    assert "Traceback" not in err
    assert not out.exists()


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
    assert code == 2, error
    assert sentence in error
    assert "Traceback" not in error


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
    assert exit_code(*given, *([] if given[0] == "export" else ["--out", tmp_path / "out"]), "--limit", "60") == 2
    assert said in capsys.readouterr().err


def test_more_replies_than_clients_cannot_be_asked_for(capsys, tmp_path):
    assert exit_code("run", "--min-clients", "5", "--clients", "4", "--limit", "60", "--out", tmp_path / "a") == 2
    assert "--min-clients 5 is more than the 4 clients of a round" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["rum"], "No such command 'rum'. Did you mean 'run', 'resume'?"),
        (
            ["matrix", "--sweep", "nonsense=1"],
            "--sweep nonsense: unknown option 'nonsense'; plugin options are given as plugin.option",
        ),
        (["matrix", "--metric", "globl@test"], "no run measures the metric 'globl@test'; did you mean 'global@test'?"),
        (["matrix", "--set", "epochs=3"], "--epochs 3 is an option of the run"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_run(monkeypatch, tmp_path, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    code, out, error = hfl(capsys, *words)
    assert (code, out) == (2, "")
    assert sentence in error
    assert error.lower().count("did you mean") <= 1
    assert not list(tmp_path.iterdir())


def test_one_round_of_one_client_is_said_in_the_singular(tmp_path, capsys):
    words = [*QUICK, "--clients", "1", "--rounds", "1", "--partition", "iid", "--no-control", "--model", "mlp"]
    code, out, _ = hfl(capsys, "run", *words, "--out", tmp_path / "o")
    assert code == 0
    assert "1 client, 1 round, seed 0" in out
    assert "overlap on digits: 1 round, 1 client, " in out


def test_the_bare_command_shows_its_help(capsys):
    code, out, error = hfl(capsys)
    assert (code, error) == (2, "")
    assert "Run one experiment" in out
