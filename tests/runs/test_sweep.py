"""Matrices of runs and their cache."""

from __future__ import annotations

import csv

import pytest

from hetfl import registry
from hetfl.cli.main import main
from hetfl.runs import sweep

SMALL = ["--limit", "150", "--clients", "3", "--rounds", "1", "--epochs", "1", "--pretrain-steps", "2", "--seeds", "0,1"]


def hfl(*words):
    with pytest.raises(SystemExit) as ended:
        main(["matrix", *words])
    return ended.value.code


def rows_of(out):
    return list(csv.DictReader((out / "matrix.csv").read_text().splitlines()))


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
