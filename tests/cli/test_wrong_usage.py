"""Sixty and more wrong usages of every command: one sentence, exit code 2, the fix named, nothing written, no traceback."""

from __future__ import annotations

import pytest

from helpers.cli import hfl

WRONG = {
    "rnu": "No such command 'rnu'. Did you mean 'run'?",
    "--nope": "No such option '--nope'.",
    "run --roundz 3": "No such option '--roundz'",
    "run --extract fedconvv": "did you mean 'fedconv'?",
    "run --aggregate overlp": "did you mean 'overlap'?",
    "run --wrap dq": "unknown wrap plugin 'dq' (known: clip, dp,",
    "run --rounds 0": "--rounds: should be greater than or equal to 1",
    "run --clients three": "--clients: should be a valid integer",
    "run --fraction 0": "--fraction: should be greater than 0",
    "run --fraction 1.5": "--fraction: should be less than or equal to 1",
    "run --batch-size 0": "--batch-size: should be greater than or equal to 1",
    "run --lr -1": "--lr: should be greater than 0",
    "run --alpha 0": "--alpha: should be greater than 0",
    "run --engine spark": "--engine: should be 'local', 'processes', 'ray', 'flower-sim' or 'flower'",
    "run --client-gpus 0.5 --ray-address 10.0.0.9:1": "--ray-address is for --engine ray, not local",
    "run --client-gpus 0.5 --engine processes": "--client-gpus is for --engine ray, not processes",
    "run --workers 0": "--workers: should be greater than or equal to 1",
    "run --workers 1000000": "--workers: should be less than or equal to 4096",
    "run --batch-size 1000000000000000000000": "--batch-size: should be less than or equal to 2147483648",
    "run --partition shards": "'pathological', 'shard', 'quantity'",
    "run --on-client-error ignore": "should be 'skip', 'retry' or 'fail'",
    "run --timeout -5": "--timeout: should be greater than 0",
    "run --set novalue": "--set takes name=value, not 'novalue'",
    "run --set fedconv.steps=2,fedconv.lr=0.1": "given once for each: --set fedconv.steps=2 --set fedconv.lr=0.1",
    "run --model-args widths=[8,8],x=3": "--model-args widths=[8,8] --model-args x=3 (text goes in double quotes)",
    """run --set levels.mix="1:2,a=3\"""": "'a=3' is no ratio",
    "run --set epochs=3": "--epochs 3 is an option of the run",
    "run --preset heterofl/nothing": "hfl presets lists them",
    "run nothing.toml": "no run file 'nothing.toml'",
    "run broken.toml": "is not TOML: Invalid value (at line 1",
    "run misspelt.toml": "did you mean 'rounds'?",
    "run --out taken": "choose another with --out or give --overwrite",
    "run --dataset nowhere.npz": "no folder or file 'nowhere.npz' for --dataset",
    "run --dataset broken.npz": "numpy.savez(path, x=…, y=…) writes one",
    "run --dataset broken.csv": "'broken.csv' cannot be read as csv: CSV parse error: Expected 2 columns",
    "run --dataset empty": "needs train*.parquet or train.npz",
    "resume": "Missing argument",
    "resume nothing": "it holds no config.toml",
    "resume begun --ray-address 10.0.0.9:1": "--ray-address is for --engine ray, not processes",
    "show": "Missing argument",
    "show nothing": "unknown plugin or run folder 'nothing' (known: availability",
    "show empty": "holds neither summary.json nor leaderboard.csv",
    "check-run nothing": "it holds no config.toml",
    "compare": "Missing argument 'PATHS...'",
    "compare nothing": "'nothing' is no folder",
    "compare empty --format html": "is not one of 'table', 'markdown', 'latex', 'csv', 'json'",
    "compare empty --target 90": "90.0 is not in the range 0<=x<=1",
    "report nothing": "'nothing' is no run folder",
    "report empty": "it holds no run.json",
    "matrix --extract heterofl,nope": "unknown extract plugin 'nope'",
    "matrix --sweep alpha": "--sweep takes name=value, not 'alpha'",
    "matrix --sweep alpha=x": "--alpha: should be a valid number",
    "matrix --seeds 0": "--seeds takes how many, such as 3, or seeds such as 0,1,2",
    "matrix --ray-address 10.0.0.9:1": "--ray-address is for --engine ray or --on ray, not local",
    "matrix --jobs 0": "0 is not in the range x>=1",
    "matrix --metric accuracy": "no run measures the metric 'accuracy' (global@test",
    "reproduce nothing": "unknown table 'nothing' (known: fedconv-mnist",
    "reproduce heflwr-mnist --rows nothing": "hfl reproduce --list shows them",
    "reproduce --budget soon": "--budget takes a time such as 90s, 30m or 2h",
    "federate --nodes 0": "0 is not in the range x>=1",
    "export flower": "Missing argument 'FOLDER'",
    "export flwr app": "No such command 'flwr'. Did you mean 'flower'?",
    "inspect nomodel": "unknown model 'nomodel' (known: cnn",
    "inspect cnn --levels 2": "--levels takes width ratios in (0, 1] such as 1,0.5,0.25",
    "inspect nets:none": "model module 'nets' cannot be imported",
    "profile nomodel": "unknown model 'nomodel' (known: cnn",
    "profile resnet18 --input 3x": "--input takes the shape of one example such as 3x32x32",
    "plan --fleet phones": "Missing option '--model'",
    "plan --fleet phonez --model cnn --input 1x8x8": "did you mean 'phones'?",
    "plan --fleet phones --model cnn --input 1x8": "the model does not run on inputs of shape (2, 1, 8)",
    "fleets phones --import trace.csv": "fleets shows 'phones' or makes a fleet with --import, not both",
    "fleets --out x.toml": "--out is for --import",
    "fleets --import trace.csv": "'imported.toml' is there already; choose another file with --out",
    "fleets nope": "no device class or fleet 'nope' (fleets: fedconv-testbed",
    "presets nothing": "hfl presets lists them",
    "new-plugin 1bad": "small letters, digits and single hyphens, such as my-method",
    "new-plugin x --kind extractor": "is not one of 'extract', 'aggregate', 'profile', 'wrap'",
    "new-plugin ok --out taken": "'taken' is not an empty folder; choose another with --out",
    "check nothing": "unknown plugin or run folder 'nothing'",
    "check nothing:Mine": "cannot be imported: ModuleNotFoundError: No module named 'nothing'",
    "check heterofl --only repeat": "did you mean 'repeats'?",
    "check heterofl --expect repeats": "--expect takes check=reason",
    "check heterofl --oracle nowhere.py": "--oracle takes module:function or a file of tests",
    "scale --clients 10,x": "--clients takes different numbers of clients such as 10,100,1000",
    "scale --extract nope --clients 10": "unknown extract plugin 'nope'",
    "list-plugins --role extract": "No such option '--role'",
    "version 3": "unexpected extra argument (3)",
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A current folder with what commands are given wrongly."""
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "taken", "begun"):
        (tmp_path / name).mkdir()
    files = {
        "taken/file": "1",
        "imported.toml": "x = 1",
        "trace.csv": "computation,communication\n" + "1,2\n" * 9,
        "begun/config.toml": 'engine = "processes"',
        "broken.npz": "1",
        "broken.csv": "a,b\n1\n2,3,4\n",
        "broken.toml": "a = = 1",
        "misspelt.toml": "rouns = 3",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize("words", WRONG)
def test_a_wrong_usage_is_one_sentence(place, capsys, words):
    before = sorted(place.rglob("*"))
    code, _, error = hfl(capsys, *words.split())
    assert code == 2, error
    assert error.startswith("hfl: ")
    assert error.count("hfl: ") == 1
    assert WRONG[words] in error
    assert error.lower().count("did you mean") <= 1
    assert "Traceback" not in error
    assert sorted(path for path in place.rglob("*") if path != place / "runs") == before


def test_every_command_is_used_wrongly():
    from hetfl.cli.main import app

    names = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    assert names - {"plugins"} <= {words.split()[0] for words in WRONG}


def test_a_list_of_one_value_or_of_several_is_read_whatever_option_it_is(capsys):
    words = ["--task", "regress", "--limit", 100, "--target-mean", 4.5, "--target-std", "2,3", "--out", "unused"]
    code, _, error = hfl(capsys, "run", *words)
    assert (code, error) == (2, "hfl: --target-std has 2 values, but task regress has 1 targets to normalise here")
