"""Asynchronous merges in simulated time: who is merged when, into what, and that it repeats to the bit."""

import math

import pytest
import torch

from helpers.runs import SIX_DEVICES, play
from hetfl.config import resolve
from hetfl.errors import UsageError
from hetfl.rounds import loop, schedule
from hetfl.rounds.reporting import NoCallback
from hetfl.rounds.schedule import rebase
from hetfl.runs.experiment import prepare
from hetfl.submodel.plan import Patch

TINY = {**SIX_DEVICES, "rounds": 4}
ASYNC = {"schedule": "fedbuff", "buffer": 2}


def ran(**values):
    """A run, after each round of which is seen what waits for a later merge."""
    return play(resolve({**TINY, **values}), lambda made: dict(made.state.underway))


def timeless(rows, but=()):
    return [{k: v for k, v in row.items() if k not in but and ("simulated" in k or "seconds" not in k)} for row in rows]


ALL = {"schedule": "fedbuff", "buffer": 3}


@pytest.mark.parametrize(
    ("extract", "values"), [("heterofl", {"schedule": "semi", "deadline": 1e6}), ("heterofl", ALL), ("fedconv", ALL)]
)
def test_a_merge_of_all_at_once_is_a_synchronous_round_to_the_bit(extract, values):
    common = {"extract": extract, "fraction": 0.5, "server_data": 20, "rounds": 2}
    one, other = ran(**common), ran(**common, **values)
    assert all(torch.equal(t, other.server.state[name]) for name, t in one.server.state.items())
    assert timeless(other.state.rows, ("staleness", "under way")) == timeless(one.state.rows)
    assert timeless(other.state.client_rows, ("staleness",)) == timeless(one.state.client_rows)


def test_without_a_buffer_a_merge_waits_for_as_many_as_a_round_needs():
    made = ran(schedule="fedbuff", min_clients=4, rounds=2)
    assert [row["clients"] for row in made.state.rows] == [4, 4]


def test_the_first_to_arrive_are_merged_and_the_others_later():
    made = ran(**ASYNC)
    sent, arrives = {}, {}
    for number, (_, now, _) in enumerate(made.rounds, 1):
        began = made.state.rows[number - 2]["simulated seconds so far"] if number > 1 else 0.0
        for client, turn in now.turns.items():
            assert client not in arrives
            sent[client], arrives[client] = number, began + turn.spent.seconds
        first = sorted(arrives, key=lambda client: (arrives[client], client))[:2]
        lines = {row["client"]: row for row in made.state.client_rows if row["round"] == number}
        assert lines.keys() == set(first)
        assert {c: line["staleness"] for c, line in lines.items()} == {c: number - sent[c] for c in first}
        assert made.state.rows[number - 1]["simulated seconds so far"] == max(arrives[client] for client in first)
        assert made.state.rows[number - 1]["under way"] == 4
        assert made.state.rows[number - 1]["joules"] == math.fsum(line["joules"] for line in lines.values())
        arrives = {client: time for client, time in arrives.items() if client not in first}
    assert {row["device"] for row in made.state.client_rows} == {"fedgmr-high"}  # the slow ones are still at it


def test_a_late_submodel_is_merged_on_its_coverage_against_the_model_it_was_taken_from(monkeypatch):
    """By hand: each merge takes one update; where its plan reached the model becomes now + (1 + n)^-0.5 (trained - then)."""
    trained = {}

    def noting(now, updates):
        for update in updates:
            trained[now.number, update.client] = {n: (p.values.clone(), p.index) for n, p in update.patches.items()}
            yield update

    monkeypatch.setattr(loop, "take_arrivals", lambda now, updates: schedule.take_arrivals(now, noting(now, updates)))
    made = ran(schedule="fedbuff", buffer=1, fleet="nano:3,rpi4:3", rounds=6)
    states = [before for before, *_ in made.rounds] + [made.server.state]
    assert {row["staleness"] for row in made.state.client_rows if row["level"] == "0.5"} >= {3, 4}
    for row in made.state.client_rows:
        then, now, after = (states[n] for n in (row["round"] - row["staleness"] - 1, row["round"] - 1, row["round"]))
        for name, (values, index) in trained[row["round"] - row["staleness"], row["client"]].items():
            expected, block = now[name].clone(), tuple(slice(n) for n in values.shape)
            assert all(len(where) == values.shape[dim] for dim, where in index.items())
            expected[block] += (values - then[name][block]) / math.sqrt(1 + row["staleness"])
            assert torch.allclose(after[name], expected, atol=1e-6)
            assert row["level"] == "1" or name == "5.bias" or not torch.equal(after[name][block], now[name][block])


@pytest.mark.parametrize(
    ("name", "moved", "expected"),
    [("w", True, [1.5, 3.0, 2.5]), ("running_var", False, [1.0, 1.5, 1.0]), ("other:w", False, [1.0, 2.0, 1.0])],
)
def test_a_change_is_discounted_and_running_statistics_are_moved_towards_the_clients(name, moved, expected):
    patch = Patch(torch.tensor([1.0, 2.0, 1.0]))
    source = {"w": torch.tensor([1.0, 2.0, 2.0]), "running_var": torch.tensor([1.0, 1.0, 1.0])}
    assert rebase(name, patch, source, 0.5, moved).values.tolist() == expected


def test_semi_merges_what_has_arrived_at_the_deadline_and_drops_nobody():
    made = ran(schedule="semi", deadline=0.2)
    assert not [row for row in made.state.client_rows if "dropped" in row]
    for row, (_, _, waiting) in zip(made.state.rows, made.rounds, strict=True):
        assert row["simulated seconds"] == pytest.approx(0.2) or not waiting
        assert all(late.arrives > row["simulated seconds so far"] for late in waiting.values())
    assert {row["device"] for row in made.state.client_rows if row["staleness"]} == {"fedgmr-low"}


def test_a_client_under_way_is_not_asked_and_one_that_takes_too_long_is_dropped():
    made = ran(**ASYNC, deadline=0.2, rounds=6)
    waiting = set()
    for _, now, then in made.rounds:
        assert not waiting & now.turns.keys()
        waiting = set(then)
    dropped = {row["client"]: row for row in made.state.client_rows if "dropped" in row}
    assert {row["device"] for row in dropped.values()} == {"fedgmr-low"}
    assert all(row["dropped"].endswith(" of 0.2 s") and "staleness" not in row for row in dropped.values())


@pytest.mark.parametrize(
    "values",
    [
        {"extract": "fedconv", "server_data": 20},
        *(pytest.param(values, marks=pytest.mark.slow) for values in (
            {"extract": "lotteryfl", "model": "cnn", "model_args": {"widths": [4, 8]}, "fleet": "phones", "levels": "1"},
            {"extract": "fedmd", "server_data": 20},
        )),
    ],
    ids=lambda v: v["extract"],
)  # fmt: skip
def test_a_stopped_run_goes_on_with_what_is_under_way(tmp_path, stops, values):
    assert stops.changes_nothing(tmp_path, resolve({**TINY, **ASYNC, "rounds": 4, "epochs": 1, **values}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"schedule": "fedbuff", "fleet": None}, "^--schedule fedbuff needs simulated time: give a fleet with --fleet"),
        ({"schedule": "semi"}, "^--schedule semi merges every --deadline seconds: give one$"),
        ({"buffer": 2}, "^--buffer is for --schedule fedbuff, not sync$"),
        ({**ASYNC, "buffer": 7}, "^--buffer 7 is more than the 6 clients of a round$"),
        ({**ASYNC, "min_clients": 3}, "^--buffer 2 is fewer than the 3 replies of --min-clients$"),
        ({**ASYNC, "over_select": 1.5}, "^--over-select is for --schedule sync"),
        ({"schedule": "fedbuf"}, "--schedule: "),
        ({**ASYNC, "staleness": -1}, "--staleness: "),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(values, said):
    with pytest.raises(UsageError, match=said):
        prepare(resolve({**TINY, **values}), NoCallback())
