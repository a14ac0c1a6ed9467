"""Wrappers around local training that go with any pair, alarms, and what a server makes of clients that misbehave."""

from __future__ import annotations

import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetfl.aggregation.updates import Merged
from hetfl.config import resolve
from hetfl.errors import RunError
from hetfl.hooks.base import Plugin
from hetfl.hooks.hookspecs import hookimpl
from hetfl.hooks.values import Coverage
from hetfl.plugins.wrappers.clip import clip_update
from hetfl.plugins.wrappers.dp import DP, compute_epsilon, count_coverage
from hetfl.rounds.alarms import Alarms
from hetfl.rounds.reporting import NoCallback
from hetfl.runs.experiment import prepare
from hetfl.submodel import encoding
from hetfl.submodel.plan import Patch
from hetfl.training.task import Reply

PAIRS = [("heterofl", "overlap"), ("fedconv", "kld"), ("fiarse", "hermes"), ("lotteryfl", "overlap"), ("fedmd", "fedmd"),
         ("dac", "median"), ("lgfedavg", "fedavg")]  # fmt: skip


def ready(steps=2, **values):
    base = {"limit": 200, "clients": 4, "rounds": 3, "epochs": 1, "pretrain_steps": 5, "levels": "1:2,0.5:2", "control": False}
    made = prepare(resolve({**base, **values}), NoCallback())
    for round in range(1, steps + 1):
        made.rounds.step(round, made.grid)
    return made


@pytest.mark.parametrize(("extract", "aggregate"), PAIRS)
@pytest.mark.parametrize("wrap", [("clip",), ("dp", "quantize")])
def test_wraps_go_with_any_pair(extract, aggregate, wrap):
    made = ready(1, extract=extract, aggregate=aggregate, wrap=wrap)
    assert all("fault" not in row for row in made.rounds.client_rows), made.rounds.client_rows[0].get("traceback")
    assert all(t.isfinite().all() for t in made.server.state.values())


@settings(deadline=None, max_examples=50)
@given(st.floats(0.01, 10), st.integers(0, 9))
def test_an_update_is_clipped_to_the_norm_and_keeps_its_direction(most, seed):
    generator = torch.Generator().manual_seed(seed)
    before = {"a": torch.randn(3, 4, generator=generator), "n": torch.tensor(3)}
    after = {"a": before["a"] + torch.randn(3, 4, generator=generator), "n": torch.tensor(7)}
    found = clip_update(after, before, most)
    change, whole = found["a"] - before["a"], after["a"] - before["a"]
    assert float(change.norm()) <= most * (1 + 1e-5) or torch.equal(found["a"], after["a"])
    assert torch.allclose(change / change.norm(), whole / whole.norm(), atol=1e-4)
    assert found["n"] == 7


@settings(deadline=None, max_examples=50)
@given(st.sampled_from(["fp16", "int8"]), st.integers(0, 9), st.floats(1e-3, 1e3))
def test_what_is_quantised_comes_back_within_half_a_step(code, seed, size):
    state = {
        "a": torch.randn(5, 7, generator=torch.Generator().manual_seed(seed)) * size,
        "n": torch.tensor(4),
        "z": torch.zeros(2),
    }
    sent, scales = encoding.encode_tensors(state, code)
    back = encoding.decode_tensors(sent, scales)
    step = scales["a"] / 2 if code == "int8" else float(state["a"].abs().max()) * 2**-11
    assert (back["a"] - state["a"]).abs().max() <= step * 1.001 + 1e-6
    assert back["a"].dtype == torch.float32
    assert torch.equal(back["z"], state["z"])
    assert back["n"] == 4
    assert encoding.payload_bytes(state, code=code) < encoding.payload_bytes(state)


def test_quantised_bytes_are_those_of_the_message():
    from hetfl.rounds.records import RecordCodec

    state = {"a": torch.randn(50, 7), "n": torch.tensor(4)}
    for code in ("fp16", "int8"):
        content = RecordCodec().seal(Reply(state, 3, code=code))
        arrays = sum(len(name.encode()) + len(array.data) for name, array in content.array_records["arrays"].items())
        scales = sum(8 + len(key.encode()) for key in content.config_records["config"] if key.startswith("scale/"))
        assert arrays + scales == encoding.payload_bytes(state, code=code)
        back = RecordCodec().open(content)
        assert torch.equal(back.state["a"], encoding.as_received(state, {}, code)["a"])


def test_noise_follows_the_coverage():
    """Its standard deviation is noise x norm / clients that cover the entry; none where nobody does."""
    made = ready(0, extract="heterofl", aggregate="overlap")
    server = made.server
    server.state = {"w": torch.zeros(4000, 3)}
    columns = [[0, 1], [0], [0]]
    covered = [Coverage(i, {"w": Patch(torch.empty(0), {1: torch.tensor(c)})}, False) for i, c in enumerate(columns)]
    assert torch.equal(count_coverage(server, covered)["w"].expand(4000, 3)[0], torch.tensor([3.0, 1.0, 0.0]))
    server.averages, server.sampled, server.population = True, 3, 3
    found = DP(norm=2.0, noise=1.5).finalize(server, Merged(server.state), covered, 1)
    spread = found.state["w"].std(0)
    assert spread[0] == pytest.approx(1.0, rel=0.1)
    assert spread[1] == pytest.approx(3.0, rel=0.1)
    assert spread[2] == 0
    assert found.facts["epsilon"] > 0


def test_epsilon_grows_with_rounds_and_shrinks_with_noise_and_sampling():
    assert compute_epsilon(1.0, 1e-5, 100, 100, 1) < compute_epsilon(1.0, 1e-5, 100, 100, 10)
    assert compute_epsilon(2.0, 1e-5, 100, 100, 10) < compute_epsilon(1.0, 1e-5, 100, 100, 10)
    assert compute_epsilon(1.0, 1e-5, 10, 100, 10) < compute_epsilon(1.0, 1e-5, 100, 100, 10)


def test_epsilon_is_reported_only_where_the_mechanism_is_the_accountants():
    known, unknown = (ready(1, extract=e, aggregate=a, wrap=("dp",)) for e, a in (("full", "overlap"), ("full", "median")))
    assert known.rounds.rows[0]["epsilon"] > 0
    assert "epsilon" not in unknown.rounds.rows[0]
    assert any("no epsilon can be given" in note for note in unknown.server.notes)


class Bad(Plugin):
    """Spoils the replies of client 1."""

    @hookimpl(wrapper=True)
    def fit(self, task):
        reply = yield
        return SPOILT[0](reply) if task.client == 1 and len(SPOILT) else reply


SPOILT = []


def boom(reply):
    raise ValueError("boom")


def quitting(reply):
    raise SystemExit(3)


def late(reply):
    time.sleep(1.5)
    return reply


def changed(**fields):
    def spoil(reply):
        for name, change in fields.items():
            setattr(reply, name, change(reply))
        return reply

    return spoil


def first(reply):
    return next(n for n, t in reply.state.items() if t.ndim > 1)


FAULTS = {
    "boom": (boom, "ValueError: boom"),
    "system exit": (quitting, "SystemExit"),
    "nan": (changed(state=lambda r: {**r.state, first(r): r.state[first(r)] * float("nan")}), "NaN or infinity"),
    "infinity": (changed(state=lambda r: {**r.state, first(r): r.state[first(r)] + math.inf}), "NaN or infinity"),
    "wrong name": (changed(state=lambda r: {"x": torch.ones(1), **r.state}), "not those that were sent"),
    "missing": (changed(state=lambda r: {n: t for n, t in r.state.items() if n != first(r)}), "not those that were sent"),
    "wrong shape": (changed(state=lambda r: {**r.state, first(r): r.state[first(r)][:1]}), "is (1"),
    "broadcastable": (changed(state=lambda r: {**r.state, first(r): r.state[first(r)][..., :1]}), ", not ("),
    "wrong dtype": (changed(state=lambda r: {**r.state, first(r): r.state[first(r)].double()}), "float64"),
    "too large": (changed(state=lambda r: {**r.state, first(r): torch.zeros(3000, 3000)}), "(3000, 3000)"),
    "undeclared": (changed(extras=lambda r: {"secret": torch.ones(3)}), "undeclared"),
    "wider plan": (changed(kept=lambda r: {"0": torch.arange(99)}), "units"),
    "wider masks": (changed(masks=lambda r: {first(r): torch.ones(9, 9, dtype=torch.bool)}), "no mask"),
    "negative examples": (changed(examples=lambda r: -5), "examples"),
    "no number": (changed(examples=lambda r: "many"), "examples"),
    "metrics": (changed(metrics=lambda r: {"round": 7.0}), "metrics"),
    "odd code": (changed(code=lambda r: "zip"), "zip"),
    "no reply": (lambda reply: {"accuracy": 1.0}, ""),
}


def with_bad(monkeypatch, spoil, **values):
    from hetfl.hooks.manager import PluginManager
    from hetfl.rounds import setup

    load = setup.loading.load_plugins
    monkeypatch.setattr(setup.loading, "load_plugins", lambda options: PluginManager({**load(options).plugins, "wrap.bad": Bad()}))
    SPOILT[:] = [spoil] if spoil else []
    base = {"extract": "heterofl", "aggregate": "overlap", "cohorts": "off"}
    return ready(0, **{**base, **values})


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_client_is_left_out_and_the_others_count(monkeypatch, name):
    spoil, said = FAULTS[name]
    made = with_bad(monkeypatch, spoil)
    made.rounds.step(1, made.grid)
    rows = {row["client"]: row for row in made.rounds.client_rows}
    assert said in rows[1]["fault"]
    assert {i for i, row in rows.items() if "fault" not in row} == {0, 2, 3}
    assert made.rounds.rows[0]["left out"] == 1
    if name in ("boom", "system exit"):
        assert "Traceback" in rows[1]["traceback"]
    good = with_bad(monkeypatch, None)
    good.rounds._accept_all = good.rounds._accept
    monkeypatch.setattr(good.rounds, "_accept", lambda c, m: None if c == 1 else good.rounds._accept_all(c, m))
    good.rounds.step(1, good.grid)
    assert all(torch.equal(made.server.state[n], good.server.state[n]) for n in made.server.state)


def test_a_late_client_is_left_out(monkeypatch):
    made = with_bad(monkeypatch, late, timeout=0.5, workers=2)
    began = time.perf_counter()
    made.rounds.step(1, made.grid)
    assert time.perf_counter() - began < 15
    rows = {row["client"]: row for row in made.rounds.client_rows}
    assert rows[1]["fault"] == "it gave no answer within 0.5 s"
    assert {i for i, row in rows.items() if "fault" not in row} == {0, 2, 3}
    SPOILT.clear()
    made.rounds.step(2, made.grid)
    assert all("fault" not in row for row in made.rounds.client_rows[-4:])


def test_a_client_is_asked_once_more(monkeypatch):
    turns = []

    def once(reply):
        turns.append(1)
        if len(turns) == 1:
            raise ValueError("boom")
        return reply

    made = with_bad(monkeypatch, once, on_client_error="retry")
    made.rounds.step(1, made.grid)
    assert len(turns) == 2
    assert made.rounds.rows[0]["left out"] == 0
    whole = with_bad(monkeypatch, None)
    whole.rounds.step(1, whole.grid)
    assert all(torch.equal(made.server.state[n], whole.server.state[n]) for n in made.server.state)


def test_a_run_that_is_to_fail_fails_with_a_sentence(monkeypatch):
    made = with_bad(monkeypatch, boom, on_client_error="fail")
    with pytest.raises(RunError, match=r"client 1 failed in round 1: ValueError: boom \(--on-client-error fail\)"):
        made.rounds.step(1, made.grid)


@pytest.mark.parametrize("values", [{"min_clients": 4}, {"min_clients": 4, "aggregate": "median"}])
def test_too_few_replies_leave_the_model_as_it_was(monkeypatch, values):
    made = with_bad(monkeypatch, boom, **values)
    before = made.server.state
    made.rounds.step(1, made.grid)
    assert made.server.state is before
    assert "3 of the 4 valid replies" in made.rounds.rows[0]["alarms"]


def test_a_merge_that_is_no_number_is_not_taken(monkeypatch):
    made = with_bad(monkeypatch, None)
    before = made.server.state
    monkeypatch.setattr(
        made.rounds.roles, "finalize", lambda s, merged, c, r: Merged({n: t * float("nan") for n, t in before.items()})
    )
    monkeypatch.setattr(type(made.rounds.roles), "finalizes", property(lambda self: True))
    made.rounds.step(1, made.grid)
    assert made.server.state is before
    assert "NaN or infinity" in made.rounds.rows[0]["alarms"]


def test_alarms_sound_once_until_they_go_away():
    alarms, rows, people = Alarms(10), [], []
    for round, (accuracy, loss) in enumerate([(0.3, 2.0), (0.1, 2.2), (0.1, 2.2), (0.1, 30.0), (0.5, 1.0)], 1):
        rows.append({"round": round, "global@test": accuracy, "global@test loss": loss})
        people += [{"round": round, "client": c, "loss": 1.0, "change": 50.0 if (round, c) == (2, 3) else 1.0} for c in range(5)]
        found = " ".join(alarms.look(rows, people))
        assert ("chance" in found) == (round == 3)
        assert ("exploded" in found) == (round == 4)
        assert ("client 3 changed" in found) == (round == 2)


def test_tuning_that_makes_the_hold_out_worse_is_said():
    made = ready(1, extract="fedconv", aggregate="overlap", set={"fedconv": {"lr": 100.0, "first_steps": 20, "steps": 20}})
    assert "loss on the hold-out rise" in made.rounds.rows[0].get("alarms", "")


def test_more_replies_than_clients_cannot_be_asked_for(capsys, tmp_path):
    from hetfl.cli.main import main

    with pytest.raises(SystemExit) as ended:
        main(["run", "--min-clients", "5", "--clients", "4", "--limit", "60", "--out", str(tmp_path / "a")])
    assert ended.value.code == 2
    assert "--min-clients 5 is more than the 4 clients of a round" in capsys.readouterr().err
