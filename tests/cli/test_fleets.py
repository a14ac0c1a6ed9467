"""Fleets on the command line: listed, shown, measured here, and runs on them."""

import csv
import json

import pytest

from helpers.cli import QUICK, hfl
from hetfl.profiling.fleets import find_fleet, list_fleets
from hetfl.runs.report import read_report


def test_fleets_are_listed_and_shown_with_their_sources(capsys):
    code, out, _ = hfl(capsys, "fleets")
    assert code == 0
    assert all(fleet.name in out for fleet in list_fleets())
    code, out, _ = hfl(capsys, "fleets", "fedgmr")
    assert code == 0
    assert "FedGMR's configs: 0.2 TMAC/s, 1/0.1 Mb/s" in out
    assert "267 x" in out  # 40 of 0.15 TFLOP/s


def test_a_fleet_that_is_not_there_is_one_sentence(capsys):
    for words in (("fleets", "phons"), ("run", *QUICK, "--fleet", "phons")):
        code, _, err = hfl(capsys, *words)
        assert code == 2
        assert err.startswith("hfl: no device class or fleet 'phons'; did you mean 'phones'?")
    for words, said in (
        (("--deadline", "-1", "--fleet", "phones"), "--deadline: "),
        (("--over-select", "0.5", "--fleet", "phones"), "--over-select: "),
        (("--over-select", "1.3"), "needs simulated time: give a fleet with --fleet"),
        (("--fleet", "phones", "--on-deadline", "wait"), "--on-deadline: "),
    ):
        code, _, err = hfl(capsys, "run", *QUICK, *words)
        assert code == 2
        assert said in err


def test_what_was_measured_here_is_a_fleet(capsys, tmp_path):
    path = tmp_path / "this.toml"
    code, out, _ = hfl(capsys, "profile", "mlp", "--input", "1x8x8", "--levels", "1,0.5,0.25", "--export", path, "--watts", "7")
    assert code == 0
    assert "step times fitted within" in out
    device = find_fleet(str(path)).device(0, 1, 0)
    assert device.watts == 7
    assert 0 < sum((device.step.op, device.step.mac, device.step.byte)) < 1e-2
    assert hfl(capsys, "fleets", path)[0] == 0
    code, _, err = hfl(capsys, "profile", "mlp", "--input", "1x8x8", "--levels", "1", "--export", path)
    assert code == 2
    assert "--export needs two widths or more" in err


@pytest.fixture
def finished(tmp_path, capsys):
    assert hfl(capsys, "run", *QUICK, "--fleet", "fedgmr", "--out", tmp_path / "r")[0] == 0
    return tmp_path / "r"


def test_the_summary_and_the_report_have_simulated_time(finished, capsys):
    rows = list(csv.DictReader((finished / "metrics.csv").read_text().splitlines()))
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["simulated seconds"] == sum(float(row["simulated seconds"]) for row in rows)
    assert summary["joules"] == pytest.approx(sum(float(row["joules"]) for row in rows))
    assert "simulated: " in hfl(capsys, "show", finished)[1]
    report = read_report(finished)
    assert report.axes[-2:] == ["simulated seconds", "joules"]
    assert report.curves[0].x["simulated seconds"] == [float(row["simulated seconds so far"]) for row in rows]
    assert report.curves[0].x["joules"][-1] == summary["joules"]
    assert hfl(capsys, "report", finished, "--out", finished / "report.html")[0] == 0
    assert "simulated seconds until the global accuracy is reached" in (finished / "report.html").read_text()
