"""What a run came to."""

from __future__ import annotations

import hetfl
from hetfl.cli.report import render_page
from hetfl.data.kinds import CLASSIFY
from hetfl.runs import report, summary

SMALL = {"model": "mlp", "rounds": 3, "epochs": 1, "pretrain_steps": 10, "clients": 3, "limit": 200, "progress": False}


def rows(ours, control):
    return [{"round": i, "global@test": a, "control@test": b} for i, (a, b) in enumerate(zip(ours, control, strict=True), 1)]


def test_the_comparison_with_the_control_says_what_is_compared_and_how_far_it_may_be_off():
    (text,) = summary.compare_to_control(rows([0.5, 0.66, 0.68, 0.69], [0.6, 0.669, 0.668, 0.67]), 360, CLASSIFY)
    assert text.startswith(
        "global@test 67.7% (66.0% to 69.0%) against control@test 66.9% (66.8% to 67.0%), means over the last 3 evaluated rounds: "
        "the difference of +0.8 points does not exceed the 7.0 that 360 test examples leave open (two standard errors)"
    )
    assert not summary.compare_to_control(rows([0.76], [0.66]), 360, CLASSIFY)
    assert not summary.compare_to_control(rows([0.677], [0.669]), 100_000, CLASSIFY)
    assert "of -6.0 points" in summary.compare_to_control(rows([0.6], [0.66]), 100_000, CLASSIFY)[0]


def test_what_was_measured_once_has_no_mean_of_three_rounds():
    run = hetfl.run(extract="heterofl", **SMALL)
    once = run.summary["accuracy"]["global@own masked"]
    assert "last" in once
    assert "last three" not in once
    assert "last three" in run.summary["accuracy"]["submodel@own"]


def test_a_global_model_that_nobody_trains_is_not_ranked():
    made = hetfl.matrix(["heterofl", "standalone"], seeds=1, controls=False, **SMALL)
    ranked = made.leaderboard.set_index("extract")
    assert ranked.loc["heterofl", "mean"] > 0
    assert "not applicable" in ranked.loc["standalone", "why"]
    row = made.results.set_index("extract").loc["standalone"]
    assert row["status"] == "ok"
    assert row[["global@test", "level-1@test"]].isna().all()
    assert row["personal@own"] > 0
    assert made.rank("personal@own").set_index("extract").loc["standalone", "mean"] > 0
    assert made.rank("pretrained@test").set_index("extract")["mean"].nunique() == 1


def test_a_report_shows_no_accuracy_of_a_global_model_that_nobody_trains(tmp_path):
    hetfl.run(extract="standalone", out=tmp_path / "r", **SMALL)
    found = report.read_report(tmp_path / "r")
    (curve,) = found.curves
    assert not any(curve.y["global@test"])
    assert all(curve.y["client@own"])
    assert "standalone" in render_page(found, tmp_path / "r")
