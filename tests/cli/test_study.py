"""hfl scale and hfl matrix."""

from __future__ import annotations

import pandas as pd
import pytest

from helpers.cli import hfl
from hetfl.cli import pictures, study
from hetfl.errors import RunError
from hetfl.runs.cell import TrialResult
from hetfl.runs.sweep import plan_trials


@pytest.mark.slow
def test_scale_measures_a_pair_by_the_number_of_clients(tmp_path, capsys):
    out = tmp_path / "scale"
    small = ["--limit", 200, "--model", "mlp", "--pretrain-steps", 2, "--rounds", 2]
    code, said, _ = hfl(capsys, "scale", "--extract", "heterofl", "--clients", "2,6", "--out", out, *small)
    assert code == 0
    assert "server seconds grow as clients^" in said
    rows = pd.read_csv(out / "scale.csv")
    assert rows["clients"].tolist() == [2, 6]
    assert (rows["server seconds"] > 0).all()
    assert (rows["peak memory"] > 1e7).all()
    assert rows["bytes up"][1] > rows["bytes up"][0] > 0
    assert (out / "scale.png").stat().st_size > 1000


@pytest.mark.parametrize(("words", "said"), [
    (["--clients", "ten"], "--clients takes different numbers of clients such as 10,100,1000, not 'ten'"),
    (["--clients", "5,5"], "--clients takes different numbers"),
    (["--clients", "10", "--rounds", "1"], "--rounds must be 2 or more here"),
    (["--clients", "10", "--extract", "fedcon"], "did you mean 'fedconv'"),
    (["--clients", "100000", "--limit", "200"], "client"),
])  # fmt: skip
def test_scale_says_what_is_wrong(tmp_path, capsys, words, said):
    code, _, error = hfl(capsys, "scale", "--out", tmp_path / "s", *words)
    assert code == 2
    assert said in error


def test_a_matrix_in_which_every_run_failed_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "draw_matrix", lambda *_: None)
    monkeypatch.setattr(study.render, "print_leaderboard", lambda *_: None)
    (trial,) = plan_trials({"dataset": "digits"}, [("heterofl", "overlap")], {}, [0])
    failed = TrialResult(trial, "failed", {"why": "no space left"})
    with pytest.raises(RunError, match=r"1 of 1 trials failed, the first: .*: no space left"):
        study.conclude([failed], "global@test", tmp_path)
