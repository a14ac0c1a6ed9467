"""Matrices of runs, their cache and leaderboard; presets."""

from __future__ import annotations

import csv
import json
import math

import pytest

from hetfl import presets, registry
from hetfl.cli.main import main
from hetfl.config import merge_options, resolve
from hetfl.errors import UsageError
from hetfl.hooks import loading
from hetfl.runs import cell as matrix
from hetfl.runs import leaderboard, sweep

SMALL = ["--limit", "150", "--clients", "3", "--rounds", "1", "--epochs", "1", "--pretrain-steps", "2", "--seeds", "0,1"]


def rows_of(out):
    return list(csv.DictReader((out / "matrix.csv").read_text().splitlines()))


def hfl(*words):
    with pytest.raises(SystemExit) as ended:
        main(["matrix", *words])
    return ended.value.code


def test_a_matrix_end_to_end_and_again_from_its_cache(tmp_path, capsys):
    out = tmp_path / "m"
    words = ["--extract", "heterofl,fedmd", "--alpha", "0.3,1", *SMALL, "--out", str(out), "--jobs", "2"]
    models = ["--set", 'extract.fedmd.models={"0.5":"mlp"}', "--aggregate", "overlap"]
    assert hfl(*words, *models) == 0
    rows = rows_of(out)
    assert len(rows) == 5 * 2 * 2
    told = {(r["extract"], r["status"]) for r in rows}
    assert ("fedmd", "not applicable") in told
    assert {("heterofl", "ok"), ("serveralone", "ok"), ("standalone", "ok"), ("exclusive", "ok")} <= told
    assert {r["seed"] for r in rows} == {"0", "1"}
    import pyarrow.parquet as parquet

    assert parquet.read_table(out / "matrix.parquet").num_rows == len(rows)
    assert (out / "heatmap.png").stat().st_size > 1000
    assert "share no coordinates" in capsys.readouterr().out
    before = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/summary.json")}
    assert hfl(*words, *models) == 0
    assert {p: p.stat().st_mtime_ns for p in out.glob("cells/*/summary.json")} == before
    assert rows_of(out) == rows
    victim = next(iter(before)).parent
    (victim / "summary.json").unlink()  # as if it had been killed
    assert hfl(*words, *models) == 0
    again = rows_of(out)
    drop = {"seconds", "client seconds"}
    assert [{k: v for k, v in r.items() if k not in drop} for r in again] == [
        {k: v for k, v in r.items() if k not in drop} for r in rows
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--extract", "heterofle"], "unknown extract plugin 'heterofle'; did you mean 'heterofl'?"),
        (["--aggregate", "kdl"], "unknown aggregate plugin 'kdl'; did you mean 'kld'?"),
        (["--sweep", "roundz=1"], "unknown option 'roundz'; did you mean 'rounds'?"),
        (["--sweep", "fedcon.steps=1"], "unknown plugin 'fedcon'; did you mean 'fedconv'?"),
        (["--sweep", "fedconv.stepz=1"], "unknown option 'fedconv.stepz'; did you mean 'steps'?"),
        (["--sweep", "lr=fast"], "--lr: "),
        (["--sweep", "seed=1,2"], "'seed' is not swept"),
        (["--seeds", "0"], "--seeds takes how many"),
        (["--dataset", "digit"], "did you mean 'digits'"),
    ],
)
def test_bad_matrices_are_refused_before_anything_runs(tmp_path, capsys, words, said):
    assert hfl(*words, "--out", str(tmp_path / "m")) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.glob("m/cells/*/summary.json"))


def test_pairs_and_controls():
    controls = [e.name for e in registry.builtins() if e.control]
    assert controls == ["serveralone", "standalone", "exclusive"]
    found = sweep.pairs(["all"], ["all"])
    extractions = [e for e in registry.entries("extract") if not e.control]
    assert len(found) == len(extractions) * len(registry.entries("aggregate")) + 3
    assert ("fedconv", "kld") in sweep.pairs(["fedconv"], ["natural"])


def test_options_reach_only_the_pairs_that_have_them():
    base = {"set": {"fedconv": {"steps": 3}, "levels": {"mix": "1"}, "aggregate": {"hermes": {"overlap": "all"}}}}
    found = sweep.cells(base, [("fedconv", "kld"), ("heterofl", "hermes")], {"kld.lr": [0.1], "data.public": [0.2]}, [0])
    assert found[0].options.set == {"fedconv": {"steps": 3}, "levels": {"mix": "1"}, "kld": {"lr": 0.1}}
    assert found[1].options.set == {"levels": {"mix": "1"}, "aggregate": {"hermes": {"overlap": "all"}}}
    assert found[0].options.server_data == 0.2
    assert found[0].key != found[1].key
    same = sweep.cells(base, [("fedconv", "kld")], {"kld.lr": [0.1], "data.public": [0.2]}, [0])
    assert same[0].key == found[0].key


def cell(extract, point, seed):
    return matrix.Trial(point, resolve({"extract": extract, "aggregate": "overlap", "seed": seed}))


def outcome(extract, point, seed, value):
    return matrix.TrialResult(cell(extract, point, seed), "ok", {"global@test": value})


def test_leaderboard():
    one, two = (("alpha", 0.1),), (("alpha", 1.0),)
    rows = [outcome("a", one, s, v) for s, v in enumerate((0.5, 0.7))] + [outcome("a", two, 0, 0.4)]
    rows += [outcome("b", one, s, 0.9) for s in (0, 1)] + [outcome("b", two, 0, 0.3)]
    refused = matrix.TrialResult(cell("c", one, 0), "not applicable", {"why": "no"})
    board = leaderboard.leaderboard([*rows, refused], "global@test")
    assert [s.extract for s in board] == ["a", "b", "c"]
    assert [s.rank for s in board] == [1.5, 1.5, math.inf]
    mean, half, seeds = board[0].values[one]
    assert (mean, seeds) == (pytest.approx(0.6), 2)
    assert half == pytest.approx(12.706 * 0.1 / 1, rel=1e-3)
    assert math.isnan(board[0].values[two][1])
    assert board[2].why == "no"


@pytest.mark.parametrize("preset", presets.presets().values(), ids=lambda p: p.name)
def test_every_preset_is_a_run(preset):
    options = resolve({**preset.values, "preset": preset.name})
    loading.load_plugins(options)
    assert preset.about
    assert len(preset.digest) == 64


def test_a_preset_is_recorded_with_what_was_changed(tmp_path):
    words = [
        "run",
        "--preset",
        "heflwr/mnist-iid-fjord",
        "--dataset",
        "digits",
        "--limit",
        "200",
        "--rounds",
        "1",
        "--out",
        str(tmp_path / "r"),
    ]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    found = json.loads((tmp_path / "r" / "run.json").read_text())["preset"]
    assert found == {
        "name": "heflwr/mnist-iid-fjord",
        "sha256": presets.find_preset("heflwr/mnist-iid-fjord").digest,
        "changed": ["rounds", "dataset"],
    }
    with pytest.raises(UsageError, match=r"did you mean 'heflwr/mnist-iid-fjord'\? \(hfl presets lists them\)"):
        presets.find_preset("heflwr/mnist-iid-fjor")


def test_settings_are_laid_over_each_other():
    assert merge_options({"a": 1, "set": {"x": {"p": 1, "q": 2}}}, {"b": 2, "set": {"x": {"q": 3}}}) == {
        "a": 1, "b": 2, "set": {"x": {"p": 1, "q": 3}},
    }  # fmt: skip
