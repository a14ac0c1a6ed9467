"""Runs side by side: what belongs together, what differs beyond chance, and the way to a target."""

from __future__ import annotations

import pytest

from helpers.ended import ended
from hetfl.config import resolve
from hetfl.errors import UsageError
from hetfl.runs import comparison
from hetfl.runs.cell import count_training_macs


def test_runs_that_differ_in_the_seed_alone_are_one_method(tmp_path):
    for seed in (0, 1):
        ended(tmp_path / "a" / str(seed), {"global@test": 0.5 + seed / 10}, seed=seed, workers=seed + 1)
    ended(tmp_path / "b", {"global@test": 0.5}, set={"extract": {"heterofl": {"scaler": True}}})
    ended(tmp_path / "c", {"global@test": 0.5}, extract="fedrolex", alpha=0.5)
    methods = comparison.group_runs(comparison.find_runs([tmp_path / "a", tmp_path / "b", tmp_path / "c"]))
    assert [(m.label, dict(m.point), len(m.runs)) for m in methods] == [
        ("heterofl x overlap", {"alpha": 0.3}, 2),
        ("heterofl x overlap", {"alpha": 0.3}, 1),
        ("fedrolex x overlap", {"alpha": 0.5}, 1),
    ]


def test_options_that_two_methods_have_and_differ_in_are_said(tmp_path):
    for scaler in (True, False):
        ended(tmp_path / str(scaler), {"global@test": 0.5}, set={"extract": {"heterofl": {"scaler": scaler}}}, lr=0.1 + scaler)
    labels = [m.label for m in comparison.group_runs(comparison.find_runs([tmp_path]))]
    assert labels == ["heterofl x overlap, lr 0.1, heterofl.scaler False", "heterofl x overlap, lr 1.1, heterofl.scaler True"]


@pytest.mark.parametrize(("a", "b", "verdict"), [
    ([0.5, 0.6, 0.7], [0.4, 0.5, 0.6], False),  # by the same 0.1 at every seed
    ([0.5, 0.6, 0.7], [0.4, 0.7, 0.6], True),
    ([0.5, 0.6, 0.7], [0.5, 0.6, 0.7], True),
    ([0.5], [0.4], None),
])  # fmt: skip
def test_differences_are_paired_by_seed(a, b, verdict):
    assert comparison.not_significant(dict(enumerate(a)), dict(enumerate(b))) is verdict


def test_the_t_test_is_scipys():
    scipy = pytest.importorskip("scipy.stats")
    for b in ([0.4, 0.5, 0.7, 0.6], [0.45, 0.57, 0.66, 0.7], [0.1, 0.9, 0.3, 0.2]):
        a = [0.5, 0.6, 0.7, 0.72]
        assert comparison.not_significant(dict(enumerate(a)), dict(enumerate(b))) == (scipy.ttest_rel(a, b).pvalue >= 0.05)


def test_the_way_to_a_target_counts_all_rounds_up_to_it(tmp_path):
    rows = [
        {"round": r, "global@test": a, "bytes down": 10, "bytes up": 1, "seconds": 2}
        for r, a in ((1, 0.3), (2, ""), (3, 0.6), (4, 0.5))
    ]
    clients = [{"round": r, "client": c, "MACs": 7, "examples": 100} for r in (1, 2, 3, 4) for c in (0, 1)]
    ended(tmp_path / "a", {"global@test": 0.5}, rows, clients, epochs=5)
    (run,) = comparison.find_runs([tmp_path / "a"])
    assert run.way("global@test", 0.6) == {"rounds": 3, "bytes": 33, "MACs": 3 * 2 * 7 * 100 * 5 * 3, "seconds": 6}
    assert run.way("global@test", 0.7) is None


def test_training_counts_the_examples_of_local_steps():
    row = {"MACs": "7", "examples": "100"}
    assert count_training_macs(row, resolve({"epochs": 5})) == 3 * 7 * 500
    assert count_training_macs(row, resolve({"local_steps": 5, "batch_size": 32})) == 3 * 7 * (100 + 32)  # a pass has 4 steps
    assert count_training_macs({"MACs": "7", "examples": ""}, resolve({})) == 0


def test_what_holds_no_run_is_refused(tmp_path):
    (tmp_path / "mnist").mkdir()
    with pytest.raises(UsageError, match="holds no run of hetfl that has ended"):
        comparison.find_runs([tmp_path / "mnist"])
    with pytest.raises(UsageError, match="did you mean 'mnist'"):
        comparison.find_runs([tmp_path / "mnits"])
