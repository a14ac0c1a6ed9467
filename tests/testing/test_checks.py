"""Each check of `hetfl.testing` fails a plugin with that fault, and passes a right one."""

from __future__ import annotations

import json

import pytest

from helpers import faulty
from helpers.cli import hfl
from hetfl import registry
from hetfl.errors import UsageError
from hetfl.plugins.wrappers.maskloss import MaskLoss
from hetfl.testing import ExtractChecks
from hetfl.testing.checks import CHECKS, Tier, checks_of
from hetfl.testing.report import Report, Result, check_plugin
from hetfl.testing.subject import Subject

BUGS = {
    "runs_with_every_partner": ("extract", faulty.Picky, "I want a mean"),
    "repeats": ("extract", faulty.Entropy, "run twice"),
    "workers_change_nothing": ("extract", faulty.CountsWorkers, "with 2 workers and 1"),
    "order_changes_nothing": ("extract", faulty.CountsCalls, "opposite order"),
    "draws_no_global_randomness": ("extract", faulty.GlobalDraw, "global generators"),
    "reads_no_wall_clock": ("extract", faulty.ReadsClock, "ReadsClock.start calls time"),
    "keeps_uncovered_entries": ("aggregate", faulty.Decays, "uncovered entries changed in round"),
    "sends_declared_extras_only": ("extract", faulty.Undeclared, "extra 'secret' is undeclared"),
    "survives_bad_replies": ("aggregate", faulty.WantsAll, "not enough values to unpack"),
    "bounds_what_a_client_costs": ("extract", faulty.Hoards, "after round 3"),
    "full_width_is_the_whole_model": ("extract", faulty.Narrow, "at width 1 the plan leaves out"),
    "puts_back_what_it_takes": ("extract", faulty.PutsElsewhere, "put(take(s)) is not s"),
    "respects_the_budget": ("extract", faulty.Greedy, "at width 0.5 a client gets 644 entries, of which 315"),
    "answers_a_width": ("profile", faulty.Wide, "asked again"),
    "state_round_trips": ("extract", faulty.Forgets, "went through state_dict"),
    "resumes": ("extract", faulty.Forgets, "stopped and resumed"),
    "stacks_as_it_says": ("wrap", faulty.OwnForward, "trained as one, the model differs in"),
    "federation_changes_nothing": ("extract", faulty.SharesMemory, "with the clients on nodes"),
    "engines_change_nothing": ("extract", faulty.ReadsProcess, "on the engines local and processes"),
}

RIGHT = {"extract": faulty.Leading, "aggregate": "overlap", "profile": "levels", "wrap": MaskLoss}


@pytest.fixture
def few_partners(monkeypatch):
    """Two built-in partners in place of all."""
    few = [e for e in registry.builtins() if e.name in ("overlap", "median", "heterofl", "fjord", "levels", "uniform")]
    monkeypatch.setattr(registry, "builtins", lambda: tuple(few))


def came_to(role, plugin, name, **more):
    return check_plugin(Subject(role, plugin, **more), only=[name]).results[0]


def test_every_check_has_its_fault():
    assert {*BUGS, "agrees_with_its_oracle"} == CHECKS.keys()


@pytest.mark.parametrize("name", [n for n in BUGS if n != "engines_change_nothing"])
def test_a_fault_is_found_and_a_right_plugin_passes(name, few_partners):
    role, plugin, said = BUGS[name]
    found = came_to(role, plugin, name)
    assert (found.status, said in found.text) == ("failed", True), found.text
    assert came_to(role, RIGHT[role], name).status == "passed"


@pytest.mark.slow
def test_another_process_is_another_process():
    role, plugin, said = BUGS["engines_change_nothing"]
    found = came_to(role, plugin, "engines_change_nothing")
    assert (found.status, said in found.text) == ("failed", True), found.text
    assert came_to(role, faulty.Leading, "engines_change_nothing").status == "passed"


def test_seconds_of_a_client_are_bounded():
    assert "a client's round took" in came_to("extract", faulty.Slow, "bounds_what_a_client_costs", seconds=0.2).text


def test_a_class_that_nobody_can_import_is_not_tried_elsewhere():
    class Inner(faulty.Leading):
        """Within a function."""

    found = came_to("extract", Inner, "engines_change_nothing")
    assert (found.status, "put it into a module" in found.text) == ("skipped", True)


def test_an_oracle_is_asked():
    name = "agrees_with_its_oracle"
    assert came_to("extract", faulty.Leading, name, oracles=[faulty.wrong_number]).text == "the paper says 5"
    assert came_to("extract", faulty.Leading, name, oracles=[faulty.right_number]).status == "passed"
    assert came_to("extract", faulty.Leading, name).status == "skipped"


def test_expected_failures_are_strict_and_have_reasons():
    subject = Subject("extract", faulty.Greedy)
    (found,) = check_plugin(subject, {"respects_the_budget": "a control"}, only=["respects_the_budget"]).results
    assert (found.status, found.text) == ("expected", "a control")
    (found,) = check_plugin(subject, {"puts_back_what_it_takes": "no"}, only=["puts_back_what_it_takes"]).results
    assert (found.status, "strike it" in found.text) == ("failed", True)
    with pytest.raises(UsageError, match="did you mean 'repeats'"):
        check_plugin(subject, {"repeat": "no"}, only=["repeats"])
    with pytest.raises(UsageError, match="without a reason"):
        check_plugin(subject, {"repeats": " "}, only=["repeats"])


@pytest.mark.parametrize(("statuses", "tier"), [
    (("passed", "passed", "passed"), Tier.GOLD), (("passed", "passed", "skipped"), Tier.SILVER),
    (("expected", "skipped", "passed"), Tier.GOLD), (("passed", "failed", "passed"), Tier.BRONZE),
    (("failed", "passed", "passed"), Tier.NONE),
])  # fmt: skip
def test_a_tier_takes_all_below_it(statuses, tier):
    results = [Result("x", name, "", status) for name, status in zip(("bronze", "silver", "gold"), statuses, strict=True)]
    assert Report("wrap", "it", results).tier == tier


class Outcomes(ExtractChecks):
    plugin = faulty.Greedy()
    expected_failures = {"respects_the_budget": "a control"}


def test_the_classes_have_a_test_for_each_check():
    names = {f"test_{check.name}" for check in checks_of("extract")}
    assert names == {name for name in dir(ExtractChecks) if name.startswith("test_")}
    Outcomes().test_puts_back_what_it_takes()
    with pytest.raises(pytest.xfail.Exception, match="a control"):
        Outcomes().test_respects_the_budget()
    with pytest.raises(pytest.skip.Exception, match="no oracle"):
        Outcomes().test_agrees_with_its_oracle()
    with pytest.raises(pytest.fail.Exception, match="644 entries"):
        type("Bare", (Outcomes,), {"expected_failures": {}})().test_respects_the_budget()


def test_hfl_check_says_how_many_ran(capsys):
    only = "respects_the_budget,puts_back_what_it_takes,agrees_with_its_oracle"
    words = ("check", "helpers.faulty:Greedy", "--only", only)
    code, out, err = hfl(capsys, *words)
    assert code == 1
    assert "2 checks ran: 1 passed, 1 failed; 1 skipped" in out
    assert "1 check of helpers.faulty:Greedy failed" in err
    more = ("--expect", "respects_the_budget=a control", "--oracle", "helpers.faulty:right_number", "--json")
    code, out, _ = hfl(capsys, *words, *more)
    facts = json.loads(out)
    assert (code, facts["ran"], facts["passed"], facts["expected"], facts["failed"]) == (0, 3, 2, 1, 0)


@pytest.mark.parametrize(("words", "said"), [
    (["heterofle"], "did you mean 'heterofl'"),
    (["heterofl", "--only", "repeat"], "did you mean 'repeats'"),
    (["heterofl", "--expect", "repeats"], "--expect takes check=reason"),
    (["heterofl", "--oracle", "helpers.faulty:wrong_numbr"], "did you mean 'wrong_number'"),
    (["heterofl", "--oracle", "nothing.py"], "is no file"),
])  # fmt: skip
def test_hfl_check_refuses_in_one_sentence(capsys, words, said):
    code, _, err = hfl(capsys, "check", *words)
    assert (code, said in err) == (2, True), err
