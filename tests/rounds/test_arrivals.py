"""Merges of what really arrives: who is merged when and into what, and what a kill drops."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from helpers.flower import Nodes
from helpers.runs import play
from hetfl.config import format_run_file, resolve
from hetfl.engines.select import EngineContext
from hetfl.errors import UsageError
from hetfl.hooks.manager import PluginManager
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import runner
from hetfl.runs.experiment import prepare
from hetfl.runs.folder import RunFolder

TINY = {
    "dataset": "digits", "limit": 120, "clients": 3, "rounds": 4, "epochs": 1, "batch_size": 8, "pretrain_steps": 0,
    "partition": "iid", "server_data": 0, "control": False, "model": "mlp", "model_args": {"hidden": [8, 6]},
    "extract": "heterofl", "levels": "1,0.5,0.5", "vmap": "off",
}  # fmt: skip
ASYNC = {"schedule": "fedbuff", "buffer": 2, "engine": "flower"}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)


def nodes_of(options, folder, held=(), failing=()):
    config = format_run_file(options.model_copy(update={"engine": "local", "schedule": "sync", "buffer": None, "deadline": None}))
    return Nodes(config, options.clients, folder, held, failing)


def ran(folder, held=(), failing=(), **values):
    """A run, after each round of which is seen who is at work; `grid`: its nodes."""
    options = resolve({**TINY, **values})
    grid = nodes_of(options, folder, held, failing) if options.engine == "flower" else None
    made = play(options, lambda made: set(made.state.at_work), EngineContext(folder, grid))
    made.grid = grid
    return made


def told(rows):
    return [{k: v for k, v in row.items() if "seconds" not in k and k not in ("staleness", "under way")} for row in rows]


SEMI = {"schedule": "semi", "deadline": 1e6, "buffer": None}


@pytest.mark.parametrize(("extract", "values"), [("heterofl", SEMI), ("lotteryfl", {"buffer": 3}), ("fedmd", {"buffer": 3})])
def test_a_merge_of_all_at_once_is_a_synchronous_round_to_the_bit(tmp_path, extract, values):
    common = {"extract": extract, "rounds": 2, "server_data": 20, "fraction": 1.0, "wrap": ("clip",)}
    one, other = ran(tmp_path, **common), ran(tmp_path / "memory", held={1: 2}, **common, **{**ASYNC, **values})
    assert all(torch.equal(t, other.server.state[name]) for name, t in one.server.state.items())
    assert told(other.state.rows) == told(one.state.rows)
    assert told(other.state.client_rows) == told(one.state.client_rows)
    assert not [client for kind, client in other.grid.sent if kind == "query"], "profiles come with hellos and replies"


def test_the_first_to_answer_are_merged_and_only_who_is_not_at_work_is_asked_anything(tmp_path):
    made = ran(tmp_path, held={0: 3}, rounds=6, **ASYNC)
    assert any(row["staleness"] for row in made.state.client_rows if row["client"] == 0)
    before = set()
    for number, (_, now, waiting) in enumerate(made.rounds, 1):
        merged = {row["client"] for row in made.state.client_rows if row["round"] == number}
        assert len(merged) == 2
        assert now.assignments.keys() == merged, "who is at work is not asked to evaluate"
        assert waiting == {0, 1, 2} - merged
        assert made.state.rows[number - 1]["under way"] == 1
        assert made.grid.trained.keys() & {(number, client) for client in before} == set(), "nor to train anew"
        before = waiting
    assert not [client for kind, client in made.grid.sent if kind == "query"], "nobody waits for the profile of one that hangs"


def test_a_late_reply_is_merged_on_its_coverage_against_the_model_that_it_was_sent(tmp_path):
    """By hand: each merge takes one; where its plan reached, the model becomes now + (1 + n)^-0.5 (trained - then)."""
    made = ran(tmp_path, held={0: 3, 1: 1}, rounds=6, **{**ASYNC, "buffer": 1})
    states = [before for before, *_ in made.rounds] + [made.server.state]
    assert {row["client"] for row in made.state.client_rows if row["staleness"]} == {0, 1, 2}
    for row in made.state.client_rows:
        sent = row["round"] - row["staleness"]
        then, now, after = states[sent - 1], states[row["round"] - 1], states[row["round"]]
        for name, values in made.grid.trained[sent, row["client"]].items():
            expected, block = now[name].clone(), tuple(slice(n) for n in values.shape)
            expected[block] += (values - then[name][block]) / math.sqrt(1 + row["staleness"])
            assert torch.allclose(after[name], expected, atol=1e-6)


def test_a_client_at_work_when_a_run_is_killed_has_new_work_afterwards(tmp_path, stops):
    options = resolve({**TINY, **ASYNC, "rounds": 4, "out": tmp_path / "run"})
    grid = nodes_of(options, tmp_path / "memory", {0: 10**6})
    with pytest.raises(stops.Stopped):
        runner.run(options, RunFolder(tmp_path / "run").open(), stops.Stopping(2), grid=grid)
    assert "real" in RunFolder(tmp_path / "run").read("run.json")["arrivals"]
    folder = RunFolder(tmp_path / "run")
    snapshot = runner.load_snapshot(options, folder, NoCallback())
    grid = nodes_of(options, tmp_path / "memory")
    runner.run(options, folder, NoCallback(), snapshot, grid)
    with open(tmp_path / "run" / "clients.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["client"] for row in rows if row["round"] in "12"] == ["1", "2"] * 2
    assert "0" in {row["client"] for row in rows if row["round"] == "3"}
    assert {row["staleness"] for row in rows if row["round"] == "3"} == {"0"}


def test_who_fails_is_left_out_and_the_others_are_waited_for(tmp_path, monkeypatch):
    made = ran(tmp_path, held={2: 3}, rounds=1, **{**ASYNC, "buffer": 3}, timeout=1e-9)
    assert all("gave no answer within" in row.get("fault", "") for row in made.state.client_rows if row["client"] == 2)
    assert made.state.rows[0]["clients"] == 3
    assert made.state.rows[0]["taken"]


def test_who_fails_is_asked_once_more_under_retry_and_a_late_failure_is_said_in_the_round_it_comes_in(tmp_path):
    whole = ran(tmp_path / "whole", rounds=1, **{**ASYNC, "buffer": 3})
    again = ran(tmp_path / "again", failing=[1], rounds=1, on_client_error="retry", **{**ASYNC, "buffer": 3})
    assert all(torch.equal(t, again.server.state[name]) for name, t in whole.server.state.items())
    assert [client for kind, client in again.grid.sent if kind == "train"] == [0, 1, 2, 1]
    away = ran(tmp_path / "away", failing=[1], rounds=1, on_client_error="retry", **ASYNC)
    assert [row["client"] for row in away.state.client_rows] == [0, 2], "who is asked again is at work, and not left out"
    assert (away.state.rows[0]["left out"], away.state.rows[0]["under way"]) == (0, 1)
    late = ran(tmp_path / "late", held={0: 1}, failing=[0], rounds=2, **ASYNC)
    assert [(row["round"], row["client"]) for row in late.state.client_rows if "boom" in row.get("fault", "")] == [(2, 0)]
    assert [row["left out"] for row in late.state.rows] == [0, 1]


def test_a_late_reply_that_cannot_be_recovered_is_said_in_the_round_it_comes_in(tmp_path, monkeypatch):
    recover = PluginManager.recover

    def fail(self, server, replies, number):
        for reply in replies:
            assert reply.client.id, "not this one"
            yield from recover(self, server, iter([reply]), number)

    monkeypatch.setattr(PluginManager, "recover", fail)
    made = ran(tmp_path, held={0: 1}, rounds=2, **ASYNC)
    assert [(row["round"], row["client"]) for row in made.state.client_rows if "not this one" in row.get("fault", "")] == [(2, 0)]
    assert [row["left out"] for row in made.state.rows] == [0, 1]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"schedule": "fedbuff", "engine": "local"}, "--schedule fedbuff needs simulated time: .* hfl federate$"),
        ({**ASYNC, "deadline": 5.0}, "^--deadline needs simulated time"),
        ({"schedule": "semi", "engine": "flower"}, "^--schedule semi merges every --deadline seconds: give one$"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, values, said):
    with pytest.raises(UsageError, match=said):
        prepare(resolve({**TINY, **values}), NoCallback())
