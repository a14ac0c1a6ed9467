"""A round when clients are late, fail or are too few."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

import hetfl
from helpers.faults import SPOILT, boom, changed, late, with_bad
from helpers.runs import run
from hetfl import Plugin, hookimpl
from hetfl.aggregation.updates import Merged
from hetfl.engines.flower.records import RecordCodec
from hetfl.engines.flower.remote import FlowerEngine
from hetfl.errors import RunError
from hetfl.hooks.manager import PluginManager
from hetfl.rounds import receiving
from hetfl.rounds.loop import MOST_NOTES, keep_notes, run_round
from hetfl.rounds.messages import too_long
from hetfl.submodel.encoding import payload_bytes
from hetfl.training.task import Reply


def test_a_late_client_is_left_out(monkeypatch):
    made = with_bad(monkeypatch, late, timeout=0.5, workers=2)
    began = time.perf_counter()
    run_round(made.state, 1, made.engine)
    assert time.perf_counter() - began < 15
    rows = {row["client"]: row for row in made.state.client_rows}
    assert rows[1]["fault"] == "it gave no answer within 0.5 s"
    assert {i for i, row in rows.items() if "fault" not in row} == {0, 2, 3}
    SPOILT.clear()
    run_round(made.state, 2, made.engine)
    assert all("fault" not in row for row in made.state.client_rows[-4:])


def test_a_client_is_asked_once_more(monkeypatch):
    turns = []

    def once(reply):
        turns.append(1)
        if len(turns) == 1:
            raise ValueError("boom")
        return reply

    made = with_bad(monkeypatch, once, on_client_error="retry")
    run_round(made.state, 1, made.engine)
    assert len(turns) == 2
    assert made.state.rows[0]["left out"] == 0
    whole = with_bad(monkeypatch, None)
    run_round(whole.state, 1, whole.engine)
    assert all(torch.equal(made.server.state[n], whole.server.state[n]) for n in made.server.state)


@pytest.mark.parametrize("extract", ["lgfedavg", "lotteryfl"])
@pytest.mark.parametrize("policy", ["retry", "skip"])
def test_a_refused_reply_leaves_nothing_in_its_clients_memory(monkeypatch, extract, policy):
    """Client 1 answers NaN once, in round 2: asked again it gives the bits of one that never did; left out, it keeps round 1's."""
    turns = []

    def once(reply):
        turns.append(1)
        return changed(state=lambda r: {n: t * float("nan") for n, t in r.state.items()})(reply) if len(turns) == 2 else reply

    made = with_bad(monkeypatch, once, extract=extract, aggregate="overlap", on_client_error=policy)
    run_round(made.state, 1, made.engine)
    first = made.engine.client_states()[1]
    run_round(made.state, 2, made.engine)
    if policy == "skip":
        kept = made.engine.client_states()[1]
        assert kept.keys() == first.keys() != set()
        assert all(torch.equal(kept[kind][n], t) for kind, state in first.items() for n, t in state.items())
        return
    assert len(turns) == 3
    whole = with_bad(monkeypatch, None, extract=extract, aggregate="overlap")
    for number in (1, 2):
        run_round(whole.state, number, whole.engine)
    assert all(torch.equal(made.server.state[n], t) for n, t in whole.server.state.items())
    ours, theirs = made.engine.client_states(), whole.engine.client_states()
    assert all(torch.equal(ours[i][k][n], t) for i, kinds in theirs.items() for k, state in kinds.items() for n, t in state.items())


def test_hooks_that_no_plugin_answers_are_not_asked(monkeypatch):
    made = with_bad(monkeypatch, None)
    assert made.state.plugins.answered >= {"extract", "aggregate", "profile", "sample", "fit"}
    for hook in {"allot", "base_state", "exchange", "client_extras", "encode", "encode_down", "receive", "finalize"}:
        monkeypatch.setattr(PluginManager, hook, lambda *_, hook=hook: pytest.fail(f"{hook} was asked"))
    now = run_round(made.state, 1, made.engine)
    assert [row.fault for row in now.row.clients.values()] == [""] * 4


def test_an_answer_far_larger_than_what_was_asked_for_is_not_read(monkeypatch):
    assert "2,000,000 bytes, of which 1,048,576 are taken" in too_long(2_000_000, 1).reason
    made = with_bad(monkeypatch, None)
    now = run_round(made.state, 1, made.engine)
    sent = receiving.instruct(now, now.assignments[1])
    whole = payload_bytes(now.assignments[1].state)
    assert too_long(2 * whole, sent) is None
    assert too_long(600_000_000, sent) is not None
    engine = FlowerEngine(4, None, 1.0)
    big = RecordCodec().encode(Reply({"x": torch.zeros(1 << 20)}, 1))
    monkeypatch.setattr(RecordCodec, "decode", lambda *_: pytest.fail("it was read"))
    answer = SimpleNamespace(has_error=lambda: False, content=big)
    assert "bytes, of which" in engine._read(answer, sent).reason


def test_a_run_that_is_to_fail_fails_with_a_sentence(monkeypatch):
    made = with_bad(monkeypatch, boom, on_client_error="fail")
    with pytest.raises(
        RunError,
        match=r"client 1 failed in round 1: wrap .*ValueError: boom \(--on-client-error fail\)",
    ):
        run_round(made.state, 1, made.engine)


@pytest.mark.parametrize("values", [{"min_clients": 4}, {"min_clients": 4, "aggregate": "median"}])
def test_too_few_replies_leave_the_model_as_it_was(monkeypatch, values):
    made = with_bad(monkeypatch, boom, **values)
    before = made.server.state
    run_round(made.state, 1, made.engine)
    assert made.server.state is before
    assert "3 of the 4 valid replies" in made.state.rows[0]["alarms"]


def test_a_merge_that_is_no_number_is_not_taken(monkeypatch):
    made = with_bad(monkeypatch, None)
    before = made.server.state
    monkeypatch.setattr(made.plugins, "finalize", lambda s, merged, c, r: Merged({n: t * float("nan") for n, t in before.items()}))
    monkeypatch.setattr(made.plugins, "answered", made.plugins.answered | {"finalize"})
    run_round(made.state, 1, made.engine)
    assert made.server.state is before
    assert "NaN or infinity" in made.state.rows[0]["alarms"]


def test_a_client_that_raises_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch):
    from hetfl.training import local as train

    whole = train.fit

    def fit(task):
        if task.client == 2:
            raise ValueError("sensor unplugged")
        return whole(task)

    monkeypatch.setattr(train, "fit", fit)
    _, summary = run(tmp_path / "a", extract="heterofl", aggregate="overlap", vmap="off")
    assert any("client 2 left out: ValueError: sensor unplugged" in note for note in summary["notes"])
    assert "sensor unplugged" in (tmp_path / "a" / "clients.csv").read_text()


def test_no_valid_reply_leaves_the_global_model_untouched(tmp_path, monkeypatch):
    from hetfl.training import local as train

    def fit(task):
        raise RuntimeError("down")

    monkeypatch.setattr(train, "fit", fit)
    for rounds, name in ((1, "a"), (3, "b")):
        with pytest.raises(RunError, match=r"every client failed in every round, .* the first, client 0: RuntimeError: down"):
            run(tmp_path / name, extract="heterofl", aggregate="overlap", vmap="off", rounds=rounds)
    assert (tmp_path / "a" / "weights.safetensors").read_bytes() == (tmp_path / "b" / "weights.safetensors").read_bytes()
    assert (tmp_path / "a" / "summary.json").exists()


def test_an_undeclared_extra_on_the_way_down_is_refused():
    class Talks(Plugin):
        @hookimpl
        def client_extras(self, server, client, plan, round):
            return {"secret": torch.zeros(2)}

    with pytest.raises(RunError, match=r"wrap plugin '.*' sends what it did not declare: extra 'secret' is undeclared"):
        hetfl.run(extract="full", aggregate="fedavg", wrap=Talks, limit=100, clients=2, pretrain_steps=0, progress=False)


def test_notes_that_are_too_many_are_counted_and_the_first_and_the_last_stay():
    run = SimpleNamespace(server=SimpleNamespace(notes=["the first", "again", "again"]), unsaid=0)
    for number in range(MOST_NOTES):
        run.server.notes += [f"round {number}: client 1 left out", "again"]
        keep_notes(run)
    assert len(run.server.notes) + run.unsaid == MOST_NOTES + 2
    assert run.server.notes[:2] == ["the first", "again"]
    assert run.server.notes[-1] == f"round {MOST_NOTES - 1}: client 1 left out"
