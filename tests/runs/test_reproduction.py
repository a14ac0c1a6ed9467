"""Published tables as data, and the scorecard of our runs."""

from __future__ import annotations

import csv
import re
import sys
import time
import tomllib
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest

from helpers.cli import exit_code
from helpers.paths import ROOT
from hetfl.cli.main import main
from hetfl.cli.reproduce import parse_duration
from hetfl.config import merge_options, resolve
from hetfl.errors import UsageError
from hetfl.hooks.loading import load_plugins
from hetfl.runs import reproduction, sweep
from hetfl.runs import tables as published
from hetfl.runs.cell import Trial, TrialResult
from hetfl.runs.reproduction import run_rows, score_row, write_scorecard
from hetfl.runs.sweep import run_trial
from hetfl.runs.tables import RowFile, TableFile, TableRow, find_rows, list_unlike, read_table, read_tables, tables

TABLE = """
[tiny]
paper = "Nobody"
about = "two rows on digits"
source = "made up"
band = 99.0
seeds = 2
unlike = "everything"

[[tiny.rows]]
name = "narrow"
options = { extract = "heterofl", dataset = "digits", limit = 150, clients = 3, rounds = 1, epochs = 1, pretrain_steps = 2 }
published = { "global@test" = 50.0, MB = 1.0 }
others = { Someone = { "global@test" = 51.0 } }
minutes = 0.001

[[tiny.rows]]
name = "narrow and dear"
options = { extract = "full", dataset = "digits", limit = 150, clients = 3, rounds = 1, epochs = 1, pretrain_steps = 2 }
published = { "global@test" = 50.0 }
minutes = 1000
"""


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The table above, as an installed package brings it."""
    package = tmp_path / "their_tables"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tables.toml").write_text(TABLE)
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("tiny", "their_tables", "hetfl.tables")
    monkeypatch.setattr(published, "entry_points", lambda group: [point] if group == "hetfl.tables" else [])
    read_tables.cache_clear()
    yield tables()["tiny"]
    read_tables.cache_clear()
    sys.modules.pop("their_tables", None)


def hfl(*words):
    return exit_code("reproduce", *words)


@pytest.mark.parametrize("row", [row for table in tables().values() for row in table.rows], ids=lambda r: f"{r.table}-{r.name}")
def test_every_row_of_the_built_in_tables_is_a_run_with_a_value(row):
    trials = row.trials(2)
    assert [trial.seed for trial in trials] == [0, 1]
    assert trials[0].key != trials[1].key
    load_plugins(trials[0].options)  # its options are those of its own plugins
    assert all(0 < value <= 100 or metric == "MB" for metric, value in row.published.items())


def test_the_rows_of_a_table_differ_from_each_other():
    for table in tables().values():
        keys = [row.trials(1)[0].key for row in table.rows]
        assert len(set(keys)) == len(keys), table.name


def test_parts_of_heterofl_that_a_row_of_the_ablation_names_are_in_its_run():
    for row in tables()["heterofl-mnist-ablation"].rows:
        options = row.trials(1)[0].options
        parts = {"sBN": options.norm_policy == "static"} | {
            n: w in options.wrap for n, w in (("scaler", "scaler"), ("mask", "maskloss"))
        }
        level, _, named = row.name.partition(": ")
        assert {part for part, there in parts.items() if there} == set(named.replace("none", "").split(" + ")) - {""}
        nets = {("a1", 4): "e", ("a1-c1", 16): "c-e"}
        assert (level, options.rounds) == (nets[options.levels, options.model_args["widths"][0]], 40)


def test_a_table_of_a_package_is_run_and_scored_within_its_budget(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert hfl("tiny", "--budget", "5m", "--out", str(out), "--jobs", "2") == 0
    lines = {(r["row"], r["metric"]): r for r in csv.DictReader((out / "scorecard.csv").read_text().splitlines())}
    narrow = lines["narrow", "global@test"]
    assert (narrow["seeds"], narrow["within"], narrow["others"], narrow["unlike"]) == ("2", "yes", "Someone 51", "everything")
    assert float(narrow["std"]) > 0
    assert float(lines["narrow", "MB"]["ours"]) > 0
    assert lines["narrow and dear", "global@test"]["within"] == "not run"
    said = capsys.readouterr().out.replace("\n", " ")
    assert "4 runs of 2 rows to do: about 1,000 minutes" in said
    assert "unlike the paper: everything" in said
    before = {p: p.stat().st_mtime_ns for p in out.glob("cells/*/summary.json")}
    assert len(before) == 2
    assert hfl("tiny", "--rows", "narrow", "--out", str(out)) == 0  # an exact name; and what is there is not run again
    assert "0 runs of 0 rows to do" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in out.glob("cells/*/summary.json")} == before


@pytest.mark.parametrize(("budget", "begun"), [(60.0, ["cheap 0"]), (1e6, ["cheap 0", "dear 0", "unknown 0", "unknown 1"])])
def test_cheap_rows_come_first_in_a_budget_and_those_of_unknown_cost_last(tmp_path, monkeypatch, budget, begun):
    plans = {TableRow("t", name, {}, {}, minutes=minutes): runs for name, minutes, runs in
             (("unknown", None, 2), ("dear", 1000, 1), ("cheap", 0.001, 1))}  # fmt: skip
    done, now = dict[str, TrialResult](), [0.0]

    def run(trials, out, jobs, until=None):
        for trial in trials:
            now[0] += 61.0 if budget == 60.0 else 1.0
            done[trial] = TrialResult(trial, "ok", {"seconds": 1.0})
            yield done[trial]

    monkeypatch.setattr(reproduction, "run_trials", run)
    for module in (reproduction, sweep):
        monkeypatch.setattr(module, "read_result", lambda out, trial: done.get(trial))
    monkeypatch.setattr(reproduction, "share_left", lambda out, trial: 1.0)
    monkeypatch.setattr(reproduction.time, "monotonic", lambda: now[0])
    list(run_rows([*plans], tmp_path, 1, lambda row: [f"{row.name} {i}" for i in range(plans[row])], budget))
    assert [*done] == begun


def test_a_row_of_unknown_cost_ends_with_its_budget(tmp_path, monkeypatch):
    done = dict[str, TrialResult]()

    def run(trials, out, jobs, until=None):
        done.update({trial: TrialResult(trial, "ok", {"seconds": 40.0}) for trial in trials})
        yield from (done[trial] for trial in trials)

    monkeypatch.setattr(reproduction, "run_trials", run)
    for module in (reproduction, sweep):
        monkeypatch.setattr(module, "read_result", lambda out, trial: done.get(trial))
    monkeypatch.setattr(reproduction, "share_left", lambda out, trial: 1.0)
    list(run_rows([TableRow("t", "r", {}, {})], tmp_path, 1, lambda row: ["seed 0", "seed 1", "seed 2"], 60.0))
    assert [*done] == ["seed 0"]  # two more would take 80 s


@pytest.mark.parametrize(("ours", "verdict"), [([0.95, 0.97], "yes"), ([0.90], "no (-6.0)"), ([], "not run")])
def test_the_verdict_is_by_the_band(ours, verdict):
    row = TableRow("t", "r", {}, {"global@test": 96.0}, band=1.0)
    results = [TrialResult(None, "ok", {"global@test": value, "seconds": 1.0}) for value in ours]
    score = score_row(row, [*results, None])[0]
    assert score.verdict == verdict
    assert score.seeds == len(ours)
    assert score.std is None if len(ours) < 2 else score.std == pytest.approx(1.4142, rel=1e-3)


def test_each_metric_has_its_own_band_and_what_has_none_is_not_judged():
    row = TableRow(
        "t",
        "r",
        {},
        {"global@own masked": 99.0, "global@test": 99.0, "MB": 99.0},
        band={"global@own masked": 1.5, "global@test": 8},
    )
    result = TrialResult(
        None, "ok", {"global@own masked": 0.96, "global@test": 0.92, "bytes down": 1e6, "bytes up": 0, "seconds": 1.0}
    )
    assert [score.verdict for score in score_row(row, [result])] == ["no (-3.0)", "yes", ""]


def test_what_a_run_does_not_measure_is_not_called_not_run():
    row = TableRow("t", "r", {}, {"personal@own": 99.0})
    assert score_row(row, [TrialResult(None, "ok", {"seconds": 1.0})])[0].verdict == "not measured"
    assert score_row(row, [None])[0].verdict == "not run"


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    {(row.options["extract"], *row.published): row for table in tables().values() for row in table.rows}.values(),
    ids=lambda row: f"{row.table}-{row.name}",
)
def test_a_run_measures_every_value_of_its_row(row, tmp_path):
    """Whatever the data and the net: digits, ten clients and two rounds stand for them."""
    small = {"dataset": "digits", "limit": 400, "clients": 10, "fraction": 0.5, "rounds": 1, "epochs": 1, "model": "cnn",
             "model_args": {"widths": [16, 16]}, "partition": "iid", "pretrain_steps": min(2, row.options.get("pretrain_steps", 2)),
             "augment": [], "local_steps": 1, "own_test": 0.2}  # fmt: skip
    trial = Trial((), resolve(merge_options(row.options, small | {"set": {"levels": {"mix": "1:5,0.5:5"}}})))
    assert run_trial(trial, tmp_path, 1, wait_for_others=False)
    assert all(score.mean is not None for score in score_row(row, [reproduction.read_result(tmp_path, trial)]))


@pytest.mark.parametrize(
    ("ours", "verdict"), [(0.9108, "yes"), (0.91085, "no (+1.01)"), (0.9109, "no (+1.01)"), (0.92, "no (+1.9)")]
)
def test_who_is_just_beyond_the_band_is_said_with_two_places(ours, verdict):
    row = TableRow("t", "r", {}, {"global@test": 90.08}, band=1.0)
    assert score_row(row, [TrialResult(None, "ok", {"global@test": ours, "seconds": 1.0})])[0].verdict == verdict


def test_what_has_failed_is_not_called_not_run():
    row = TableRow("t", "r", {}, {"global@test": 99.0})
    assert score_row(row, [TrialResult(None, "failed", {"why": "no data"}), None])[0].verdict == "failed"
    assert score_row(row, [TrialResult(None, "not applicable", {"why": "no"})])[0].verdict == "not applicable"


def test_the_rest_of_a_run_that_was_stopped_is_what_counts(tiny, tmp_path):
    trials = [replace(t, options=t.options.model_copy(update={"rounds": 400})) for t in tiny.rows[0].trials()]
    for kept in (20, 280):
        file = tmp_path / "cells" / trials[0].name / "checkpoints" / f"round-{kept:06d}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    assert [reproduction.share_left(tmp_path, trial) for trial in trials] == [pytest.approx(0.3), 1.0]
    assert reproduction.estimate_seconds(tmp_path, trials, 100.0, 1) == pytest.approx(130)
    assert reproduction.estimate_seconds(tmp_path, trials, 100.0, 2) == pytest.approx(100)


@pytest.mark.slow
def test_what_runs_when_the_budget_ends_is_stopped_and_goes_on(tiny, tmp_path, capsys):
    long = TABLE.replace("rounds = 1,", "rounds = 40000,").replace("minutes", "# minutes")
    (tmp_path / "their_tables" / "tables.toml").write_text(long)
    read_tables.cache_clear()
    began = time.monotonic()
    assert hfl("tiny", "--budget", "12s", "--out", str(tmp_path / "out")) == 0
    assert time.monotonic() - began < 60
    said = " ".join(capsys.readouterr().out.split())
    assert "2 rows left to run or to end: tiny narrow, tiny narrow and dear; the same command goes on there" in said
    lines = csv.DictReader((tmp_path / "out" / "scorecard.csv").read_text().splitlines())
    assert {line["within"] for line in lines} == {"not run"}


def test_rows_of_one_name_in_two_tables_are_both_checked():
    rows = [TableRow(table, "r", {"extract": "full", "wrap": wrap}, {}) for table, wrap in (("one", ["zz"]), ("two", []))]
    assert [(row.table, str(error)[:21]) for row, error in reproduction.find_bad(rows, TableRow.trials).items()] == [
        ("one", "table 'one': row 'r':")
    ]
    with pytest.raises(UsageError, match="unknown wrap plugin 'zz'"):
        sweep.refuse_bad([trial for row in rows for trial in row.trials()])


def test_what_is_unlike_the_paper_is_said_once():
    rows = [TableRow("t", name, {}, {}, unlike=said) for name, said in
            (("a", ("all", "two")), ("b", ("all", "two", "one")), ("c", ("all",)))]  # fmt: skip
    assert list_unlike(rows) == {"": "all", "a, b": "two", "b": "one"}
    assert list_unlike(rows[:2]) == {"": "all; two", "b": "one"}


def test_the_scorecard_keeps_what_other_commands_found(tmp_path):
    def score(name, device, value):
        result = TrialResult(None, "ok", {"global@test": value, "seconds": 1.0})
        write_scorecard(score_row(TableRow("t", name, {}, {"global@test": 96.0}), [result]), device, tmp_path)

    for words in (("a", "cpu", 0.5), ("b", "cpu", 0.6), ("a", "cuda", 0.7), ("a", "cpu", 0.8)):
        score(*words)
    lines = csv.DictReader((tmp_path / "scorecard.csv").read_text().splitlines())
    assert [(r["row"], r["device"], r["ours"]) for r in lines] == [
        ("a", "cpu", "80.0"),
        ("b", "cpu", "60.0"),
        ("a", "cuda", "70.0"),
    ]


def test_the_scorecard_keeps_a_value_that_has_no_new_one_and_names_that_spreadsheets_compute(tmp_path):
    row = TableRow("t", "+ mask", {}, {"global@test": 96.0})
    measured = score_row(row, [TrialResult(None, "ok", {"global@test": 0.95, "seconds": 1.0})])
    for scores in (measured, score_row(row, [None]), measured, score_row(row, [None])):
        write_scorecard(scores, "cpu", tmp_path)
    (line,) = csv.DictReader((tmp_path / "scorecard.csv").read_text().splitlines())
    assert (line["ours"], line["within"]) == ("95.0", "yes")


def test_seeds_that_ended_earlier_count_beside_those_asked_for(tiny, tmp_path, monkeypatch):
    ended = {0: 0.5, 1: 0.7, 3: 0.1}

    def read(out, trial):
        value = ended.get(trial.seed)
        return None if value is None else TrialResult(trial, "ok", {"global@test": value, "seconds": 1.0})

    monkeypatch.setattr(reproduction, "read_result", read)
    (score, _) = reproduction.score_rows(tiny.rows[1:], tmp_path, lambda row: row.trials(1)) * 2
    assert (score.mean, score.seeds) == (pytest.approx(60), 2)


@pytest.mark.parametrize("theirs", ["name,score\nalice,1\nbob,2\n", None])
def test_what_is_no_scorecard_is_refused_and_stays(tiny, tmp_path, capsys, theirs):
    file = tmp_path / "out" / "scorecard.csv"
    file.mkdir(parents=True) if theirs is None else (file.parent.mkdir(), file.write_text(theirs))
    assert hfl("tiny", "--out", str(file.parent)) == 2
    assert "is no scorecard of hfl reproduce; choose another --out" in " ".join(capsys.readouterr().err.split())
    assert file.is_dir() if theirs is None else file.read_text() == theirs


def test_the_page_says_what_every_key_of_a_table_is_and_its_example_is_one():
    page = (ROOT / "docs" / "reproduction.md").read_text()
    mine = page.partition("## Running them")[2].partition("## Disputed")[0]
    of_table, of_row = mine.partition("| key of a table |")[2].split("| key of a row |")
    for text, kind in ((of_table, TableFile), (of_row, RowFile)):
        named = {key for line in text.splitlines() for key in re.findall(r"`(\w+)`", line.split("|")[1] if "|" in line else "")}
        assert named == set(kind.model_fields)
    example = mine.split("```toml")[2].partition("```")[0]
    ((name, values),) = tomllib.loads(example).items()
    row = read_table(name, values).rows[0]
    assert (row.options["rounds"], row.unlike[0]) == (20, "20 rounds, not 50")


def test_what_cannot_be_found_is_said(tiny):
    with pytest.raises(UsageError, match="unknown table 'tini'; did you mean 'tiny'"):
        find_rows("tini", [])
    with pytest.raises(UsageError, match="no row is called 'narow'; did you mean 'narrow'"):
        find_rows("tiny", ["narow"])
    assert [row.name for row in find_rows("tiny", ["dear"])] == ["narrow and dear"]


ROW = {"name": "r", "options": {"extract": "full"}, "published": {"global@test": 50.0}}

PRESET = "heflwr/mnist-iid-full"


@pytest.mark.parametrize(("table", "row", "said"), [
    ({"sedes": 2}, {}, "table 't': unknown key 'sedes'; did you mean 'seeds'?"),
    ({"rows": []}, {}, "table 't': rows: list should have at least 1 item"),
    ({"paper": None}, {}, "table 't': paper: input should be a valid string"),
    ({"band": -1}, {}, "table 't': band: input should be greater than or equal to 0"),
    ({"seeds": 0}, {}, "table 't': seeds: input should be greater than or equal to 1"),
    ({"rows": [ROW, ROW]}, {}, "table 't': two rows bear the name 'r'"),
    ({"rows": [{**ROW, "name": ""}]}, {}, "table 't': row 1: name: string should have at least 1 character"),
    ({}, {"pubished": {}}, "table 't': row 'r': unknown key 'pubished'; did you mean 'published'?"),
    ({}, {"published": {}}, "table 't': row 'r': published: dictionary should have at least 1 item"),
    ({}, {"published": {"globl@test": 1}}, "no run measures the metric 'globl@test'; did you mean 'global@test'?"),
    ({}, {"published": {"global@test": 101}}, "row 'r': global@test is in percent, not 101"),
    ({}, {"others": {"Flower": {"global@test": "high"}}}, "row 'r': others: input should be a valid number"),
    ({}, {"others": {"Flower": {"client@own": 50.0}}}, "row 'r': others: client@own is no value of the paper's here"),
    ({"band": {"globl@test": 1}}, {}, "no run measures the metric 'globl@test'; did you mean 'global@test'?"),
    ({}, {"band": {"globl@test": 1}}, "row 'r': no run measures the metric 'globl@test'; did you mean 'global@test'?"),
    ({}, {"minutes": -3}, "row 'r': minutes: input should be greater than 0"),
    ({}, {"preset": PRESET[:-1]}, f"row 'r': unknown preset '{PRESET[:-1]}'; did you mean '{PRESET}'?"),
    ({}, {"options": {"extrct": "full"}}, "row 'r': unknown option 'extrct'; did you mean 'extract'?"),
    ({}, {"options": 3}, "row 'r': options: input should be a valid dictionary"),
    ({}, {"options": {**ROW["options"], "seed": 7}}, "row 'r': options: 'seed' is no option of a row (a row has `seeds`)"),
    ({}, {"options": {"preset": PRESET}}, "row 'r': options: 'preset' is no option of a row (it is a key of the row)"),
    ({}, {"options": {"device": "cuda"}}, "row 'r': options: 'device' is no option of a row (hfl reproduce has --device)"),
    ({}, {"seeds": True}, "row 'r': seeds: input should be a valid integer"),
    ({}, {"published": {"global@test": True}}, "row 'r': published: input should be a valid number"),
    ({}, {"name": " "}, "name: string should have at least 1 character"),
])  # fmt: skip
def test_what_is_wrong_with_a_table_is_said(table, row, said):
    with pytest.raises(UsageError) as refused:
        read_table("t", {"paper": "P", "about": "A", "source": "S", "rows": [{**ROW, **row}], **table})
    assert said in str(refused.value)


@pytest.mark.parametrize(("text", "said"), [
    ("[tiny", "tables.toml of their_tables is not TOML"),
    (TABLE.replace("tiny", "heflwr-mnist"), "tables.toml of their_tables: there is another table 'heflwr-mnist'"),
    (None, "tables.toml of their_tables (entry point 'tiny' of hetfl.tables) cannot be read"),
    ("tiny = " + "[" * 5000, "tables.toml of their_tables is not TOML"),
])  # fmt: skip
def test_a_package_whose_file_cannot_be_read_is_named_and_costs_no_others_tables(tiny, tmp_path, capsys, text, said):
    file = tmp_path / "their_tables" / "tables.toml"
    file.unlink() if text is None else file.write_text(text)
    read_tables.cache_clear()
    assert hfl("--list") == 0
    listed = capsys.readouterr()
    assert said in " ".join(listed.err.split())
    assert all(f"{name} (" in listed.out for name in ("heflwr-mnist", "fedconv-mnist"))
    assert "tiny (" not in listed.out
    assert hfl("tiny", "--list") == 2
    assert "unknown table 'tiny' (known: " in (refused := " ".join(capsys.readouterr().err.split()))
    assert said in refused


@pytest.mark.parametrize("code", ["raise RuntimeError('not today')", "import sys; sys.exit(3)", "1 +", "raise NameError('x')"])
def test_a_package_whose_own_code_fails_costs_no_others_tables(tiny, tmp_path, capsys, code):
    (tmp_path / "their_tables" / "__init__.py").write_text(code)
    sys.modules.pop("their_tables", None)
    read_tables.cache_clear()
    assert hfl("heflwr-mnist", "--list") == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "tables.toml of their_tables (entry point 'tiny' of hetfl.tables) cannot be read: " in said


def test_a_row_of_which_no_run_can_be_made_is_named_and_costs_no_other(tiny, tmp_path, capsys, monkeypatch):
    bad = TABLE.replace('"heterofl"', '"full"').replace("pretrain_steps = 2 }", "pretrain_steps = 2, wrap = ['zz'] }", 1)
    (tmp_path / "their_tables" / "tables.toml").write_text(bad)
    read_tables.cache_clear()
    assert hfl("tiny", "--out", str(tmp_path / "out")) == 2
    assert "table 'tiny': row 'narrow': unknown wrap plugin 'zz'" in " ".join(capsys.readouterr().err.split())
    ran = []
    monkeypatch.setattr(reproduction, "run_trials", lambda trials, *_: iter(ran.extend(trials) or ()))
    assert hfl("--rows", "narrow and dear,narrow", "--out", str(tmp_path / "out")) == 0
    assert "unknown wrap plugin 'zz'" in " ".join(capsys.readouterr().err.split())
    assert {trial.point for trial in ran} == {(("table", "tiny"), ("row", "narrow and dear"))}


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("2", 120)])
def test_a_budget_is_a_time(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["0", "-1m", "soon", "3d"])
def test_what_is_no_time_is_refused(text, capsys):
    assert hfl("--budget", text) == 2
    assert "--budget takes a time such as 90s, 30m or 2h" in capsys.readouterr().err


def test_no_word_for_rows_is_refused(capsys):
    assert hfl("heflwr-mnist", "--rows", ",", "--list") == 2
    assert "--rows takes names of rows" in capsys.readouterr().err


def test_the_list_runs_nothing_and_repeats_nothing(tmp_path, capsys):
    assert hfl("heflwr-mnist", "--list", "--out", str(tmp_path / "none")) == 0
    said = capsys.readouterr().out
    assert "exclusive Dirichlet 0.5" in said
    assert said.count("on record") == said.count("padding is not") == 1
    assert "unlike the paper (heterofl IID, heterofl Dirichlet 0.5): bare slices" in said.replace("\n", " ")
    assert not (tmp_path / "none").exists()


def test_what_has_ended_is_scored_at_once_so_that_a_kill_leaves_it(tiny, tmp_path, monkeypatch, capsys):
    ended = dict[str, TrialResult]()

    def killed(trials, out, jobs, until=None):
        row = {"global@test": 0.5, "bytes down": 1.0, "bytes up": 1.0, "seconds": 1.0}
        ended[trials[0].key] = TrialResult(trials[0], "ok", row)
        yield ended[trials[0].key]
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduction, "run_trials", killed)
    for module in (reproduction, sweep):
        monkeypatch.setattr(module, "read_result", lambda out, trial: ended.get(trial.key))
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        main(["reproduce", "tiny", "--out", str(tmp_path)])
    assert "table tiny, row narrow seed 0: global@test 50.0, MB 0.0" in " ".join(capsys.readouterr().out.split())
    lines = csv.DictReader((tmp_path / "scorecard.csv").read_text().splitlines())
    assert [line["within"] for line in lines] == ["yes", "no (-1.0 MB)", "not run"]


def test_a_device_that_is_not_there_is_refused_before_any_row(tiny, tmp_path, capsys):
    assert hfl("tiny", "--device", "cuda:99", "--out", str(tmp_path / "out")) == 2
    assert "--device cuda:99 cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
