"""The report: its figures against the tables that it is made of, and the page in a real browser."""

from __future__ import annotations

import csv
import json
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser

import pytest

from helpers.cli import exit_code
from hetfl.cli.report import render_page
from hetfl.runs.report import read_report

TINY = ["--limit", "150", "--clients", "3", "--rounds", "2", "--epochs", "1", "--pretrain-steps", "2", "--levels", "1:1,0.5:2"]

# Where it is absent the browser's tests are skipped: apt-get install chromium
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")

SCRIPT = """<script>
const svg = document.querySelector("#curve-chart svg");
svg.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"}));
document.body.dataset.keyboard = document.getElementById("curve-said").textContent;
document.body.dataset.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.querySelector("#legend button").click();
document.body.dataset.left = document.querySelectorAll("#curve-chart .curve").length;
</script>"""


def lines_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, and a matrix of one pair and its controls at two points with two seeds."""
    where = tmp_path_factory.mktemp("report")
    assert exit_code("run", "--extract", "heterofl", *TINY, "--out", where / "run") == 0
    assert exit_code("matrix", "--extract", "heterofl", "--alpha", "0.3,10", "--seeds", "2", *TINY, "--out", where / "matrix") == 0
    return where


class Page(HTMLParser):
    """What a page asks of other places, and its tables."""

    def __init__(self, text):
        super().__init__()
        self.wanted, self.tables, self.ids = [], 0, set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tables += tag == "table"
        self.ids |= {value for name, value in attrs if name == "id"}
        self.wanted += [value for name, value in attrs if name in ("src", "href") and not value.startswith("#")]


def test_a_report_of_a_run_shows_the_figures_of_its_tables(runs):
    report = read_report(runs / "run")
    (curve,) = report.curves
    rows = lines_of(runs / "run" / "metrics.csv")
    people = lines_of(runs / "run" / "clients.csv")
    assert [y[0] for y in curve.y["global@test"]] == [round(100 * float(r["global@test"]), 2) for r in rows]
    assert curve.x["MB"][-1] == pytest.approx(sum(float(r["bytes down"]) + float(r["bytes up"]) for r in rows) / 1e6)
    macs = sum(3 * float(p["MACs"]) * float(p["examples"]) for p in people)
    assert curve.x["training GMACs"][-1] == pytest.approx(macs / 1e9)
    assert [level["level"] for level in curve.levels] == ["1", "0.5"]
    assert curve.levels[1]["accuracy"] == round(100 * float(rows[-1]["level-0.5@test"]), 2)
    assert sorted(curve.own) == sorted(100 * float(p["own accuracy"]) for p in people if p["round"] == "2" and p["own accuracy"])
    assert report.facts["weights sha256"] == json.loads((runs / "run" / "summary.json").read_text())["weights sha256"]
    assert "control@test" in curve.y


def test_a_report_of_a_matrix_has_means_over_seeds_and_the_protocols(runs):
    report = read_report(runs / "matrix")
    curve = next(c for c in report.curves if c.name == "heterofl x overlap, alpha 0.3")
    lines = lines_of(runs / "matrix" / "matrix.csv")
    cells = [c for c in lines if c["extract"] == "heterofl" and c["alpha"] == "0.3"]
    last = []
    for cell in cells:
        path = next((runs / "matrix" / "cells").glob(f"*-{cell['config']}")) / "metrics.csv"
        last.append(100 * float(lines_of(path)[-1]["global@test"]))
    assert curve.seeds == 2
    assert curve.y["global@test"][-1] == [round(statistics.fmean(last), 2), round(statistics.stdev(last), 2)]
    assert {c.pair for c in report.curves if c.control} == {"serveralone x overlap", "standalone x overlap"}
    points, pairs = report.robustness()
    assert points == ["alpha 0.3", "alpha 10"]
    assert dict(pairs)["heterofl x overlap"][0] == curve.y["global@test"][-1][0]
    budgets, best = report.quality_under_budget("MB")
    assert dict(best)[curve.name][-1] == max(y[0] for y in curve.y["global@test"])
    assert budgets == sorted(budgets)
    for name, costs in report.cost_to_target("MB"):
        one = next(c for c in report.curves if c.name == name)
        for target, cost in zip((50, 70, 80, 90, 95), costs, strict=True):
            reached = [x for x, y in zip(one.x["MB"], one.y["global@test"], strict=True) if y and y[0] >= target]
            assert cost == (reached[0] if reached else None)


@pytest.mark.parametrize("name", ["run", "matrix"])
def test_the_page_needs_nothing_from_elsewhere(runs, name, capsys):
    assert exit_code("report", runs / name) == 0
    text = (runs / name / "report.html").read_text()
    page = Page(text)
    assert page.wanted == []
    assert re.sub(r"http://www\.w3\.org/2000/svg", "", text).count("http") == 0
    assert len(text) < 3_000_000
    assert page.tables >= 5
    assert {"curves", "levels", "clients", "protocols", "partition", "facts"} <= page.ids
    assert "report.html" in capsys.readouterr().out.replace("\n", "")


def test_foreign_words_are_text(runs):
    from dataclasses import replace

    report = read_report(runs / "run")
    bad = "</script><script>alert(1)</script>"
    curve = replace(report.curves[0], pair=bad)
    text = render_page(replace(report, title=bad, notes=[bad], curves=[curve], classes=[bad]), runs / "run")
    assert "<script>alert" not in text
    assert text.count("</script>") == 2


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert exit_code("report", tmp_path) == 2
    assert "is no run folder of hetfl" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize("width", [1280, 600])
def test_a_browser_draws_it_and_obeys_the_keyboard(runs, tmp_path, width):
    text = render_page(read_report(runs / "matrix"), runs / "matrix").replace("</body>", SCRIPT + "</body>")
    (tmp_path / "page.html").write_text(text)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync",
             "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},1000"]  # fmt: skip
    address = f"{(tmp_path / 'page.html').as_uri()}#axis=MB"
    seen = subprocess.run([CHROMIUM, *flags, "--virtual-time-budget=2000", "--dump-dom", address],
                          capture_output=True, text=True, timeout=120).stdout  # fmt: skip
    found = dict(re.findall(r'data-(keyboard|overflow|left)="([^"]*)"', seen))
    assert re.match(r"MB [\d.]+: .*heterofl x overlap, alpha", found["keyboard"])
    assert int(found["overflow"]) <= 0
    curves = len(re.findall(r'class="curve"', seen))
    assert (
        curves == int(found["left"]) == 6
    )  # 3 pairs with a global model at 2 points and the control, less the one that was switched off
    assert seen.count('class="front"') == 1
    assert len(re.findall(r"<rect ", seen)) > 0
    assert seen.count("<circle") > 10
