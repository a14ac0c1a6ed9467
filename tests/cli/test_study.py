"""hfl scale."""

from __future__ import annotations

import pandas as pd
import pytest

from helpers.cli import hfl


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
