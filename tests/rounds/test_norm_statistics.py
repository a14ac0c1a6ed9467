"""Batch norm's statistics under each policy."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.runs import NORMED, run
from hetfl.errors import UsageError
from hetfl.models.state import load_state
from hetfl.rounds import norm_statistics
from hetfl.rounds.client import ClientRuntime
from hetfl.rounds.loop import run_round
from hetfl.rounds.messages import Failure
from hetfl.submodel.encoding import payload_bytes

CNN = {"extract": "heterofl", "aggregate": "overlap", "model": "cnn", "model_args": {"widths": [8, 8]}}


NORMS = ("1", "5")


def norm_inputs(net, state, data):
    """What enters each layer of the chain `net` in training mode, in one batch of a client's examples: (channels, values)."""
    found, x = {}, data.train.all()[0]
    with torch.no_grad():
        for name, layer in load_state(copy.deepcopy(net), state).train().named_children():
            found[name] = x.transpose(0, 1).flatten(1)
            x = layer(x)
    return found


def test_static_pools_the_whole_network_over_the_examples_of_all_clients(simulate):
    """spec heterofl 2.4: one pass of the clients' data through the GLOBAL network, not through each client's slice of it."""
    made = simulate(1, **CNN, norm_policy="static", levels="1,0.25,0.25", clients=3, eval_batch_size=512, vmap="off")
    state, net = made.server.state, made.server.builder.build()
    seen = [norm_inputs(net, state, c) for c in made.federation.clients]
    for n in NORMS:
        together = torch.cat([s[n] for s in seen], 1)
        assert torch.allclose(state[f"{n}.running_mean"], together.mean(1), atol=1e-5), n
        assert torch.allclose(state[f"{n}.running_var"], together.var(1, correction=0), rtol=1e-4), n


def test_static_counts_the_whole_model_down_and_the_statistics_up(simulate):
    cheap, whole = (
        simulate(1, **CNN, norm_policy=policy, levels="1,0.25,0.25", clients=3).state.rows[-1] for policy in ("aggregate", "static")
    )
    made = simulate(0, **CNN, clients=3)
    size = payload_bytes(made.server.state)
    statistics = payload_bytes({n: t for n, t in made.server.state.items() if n.endswith(("_mean", "_var"))})
    assert whole["bytes down"] - cheap["bytes down"] == 3 * size
    assert whole["bytes up"] - cheap["bytes up"] == 3 * statistics
    assert whole["statistics bytes"] == 3 * (size + statistics)


@pytest.mark.parametrize(
    ("aggregate", "name", "clients"),
    [("overlap", "level-0.25@test", (1, 2)), ("cluster", "personal-0.25@test", (1, 2)), ("cluster", "personal-1@test", (0,))],
)
def test_a_slice_or_a_model_of_its_own_is_tested_with_statistics_of_its_own(simulate, aggregate, name, clients):
    """Its channels are fed by fewer others than in the global network, or by other weights, whose statistics are far off."""
    values = {**CNN, "aggregate": aggregate, "levels": "1,0.25,0.25", "clients": 3, "eval_batch_size": 512, "vmap": "off"}
    made = simulate(1, **values, norm_policy="static")
    server, assigned = made.server, made.last.assignments[clients[0]]
    plan, source = assigned.plan, assigned.source
    assert (source is server.state) == (aggregate == "overlap")
    small, tested = server.builder.build(plan.sizes), dict(plan.take(source))
    seen = [norm_inputs(small, tested, made.federation.clients[i]) for i in clients]
    for n in NORMS:
        together = torch.cat([s[n] for s in seen], 1)
        tested |= {f"{n}.running_mean": together.mean(1), f"{n}.running_var": together.var(1, correction=0)}
    expected = server.score(tested, made.federation.test, plan.sizes)
    assert made.state.rows[-1][name] == pytest.approx(expected.accuracy, abs=1e-9)
    assert made.state.rows[-1][f"{name} loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert server.score(plan.take(source), made.federation.test, plan.sizes).loss != pytest.approx(expected.loss, rel=3e-4)


def test_a_client_that_cannot_hold_the_whole_model_is_left_out_of_its_statistics(simulate, monkeypatch):
    made = simulate(0, **CNN, norm_policy="static", levels="1,0.25,0.25", clients=3, workers=1)
    measure = made.engine.__class__.ask

    def ask(engine, kind, contents):
        for client, answer in measure(engine, kind, contents):
            yield client, Failure("MemoryError: too large") if kind == "statistics" and client == 2 else answer

    notes = []
    monkeypatch.setattr(made.engine.__class__, "ask", ask)
    monkeypatch.setattr(made.state.callback, "note", notes.append, raising=False)
    run_round(made.state, 1, made.engine)
    assert notes[0] == "round 1: client 2 left out of the statistics: MemoryError: too large"


@pytest.mark.parametrize("policy", ["static", "static-slices", "recalibrate"])
def test_statistics_policies(tmp_path, policy):
    """spec heterofl 2.4: statistics come from passes, not from the mean of what clients tracked."""
    values = {"extract": "heterofl", "aggregate": "overlap", "model": "cnn", "model_args": {"widths": [8, 8]}, "rounds": 1}
    mean, _ = run(tmp_path / "a", **values)
    other, _ = run(tmp_path / "b", norm_policy=policy, **values)
    assert not torch.equal(mean["1.running_var"], other["1.running_var"])
    assert torch.equal(mean["0.weight"], other["0.weight"])


def test_local_statistics_never_travel(tmp_path):
    _, local = run(tmp_path / "a", norm_policy="local", **NORMED)
    _, all_of_it = run(tmp_path / "b", norm_policy="aggregate", **NORMED)
    _, again = run(tmp_path / "c", norm_policy="local", workers=1, **NORMED)
    assert local["bytes up"] < all_of_it["bytes up"]
    assert local["bytes down"] < all_of_it["bytes down"]
    assert local["accuracy"] == again["accuracy"]
    with pytest.raises(UsageError, match="--norm-policy local needs public data"):
        run(tmp_path / "d", norm_policy="local", server_data=0, **NORMED)


@pytest.mark.parametrize(
    ("values", "said"),
    [({}, 1), ({"norm_policy": "static"}, 0), ({"levels": "0.5"}, 0), ({"extract": "standalone"}, 0), ({"model": "mlp"}, 0)],
)
def test_that_narrow_models_are_tested_with_the_statistics_of_others_is_said_once(simulate, stops, values, said):
    values = {**CNN, "clients": 3, **values}
    made = simulate(0, **{**values, "model_args": {} if values["model"] == "mlp" else values["model_args"]})
    made.state.callback = stops.Stopping(None)
    for number in (1, 2):
        run_round(made.state, number, made.engine)
    assert sum("statistics that are not theirs" in note for note in made.state.callback.notes) == said


@pytest.mark.parametrize(("policy", "passes"), [("static", (7, 5)), ("static-slices", (5, 3))])
def test_statistics_that_are_known_are_not_asked_for_again_and_would_be_the_same(simulate, monkeypatch, policy, passes):
    """Of three clients two are narrow. In round 1 all pass, then the narrow ones for the level, and for what they had been sent."""
    asked, measure = [], ClientRuntime.statistics

    def count(self, client, *more):
        asked.append(client)
        return measure(self, client, *more)

    monkeypatch.setattr(ClientRuntime, "statistics", count)
    values = {**CNN, "norm_policy": policy, "levels": "1,0.25,0.25", "clients": 3, "workers": 1, "rounds": 3}
    made, again = simulate(0, **values), simulate(0, **values)
    for number in (1, 2, 3):
        asked.clear()
        row = run_round(made.state, number, made.engine).row
        assert len(asked) == passes[number > 1]
        again.state.own_statistics.clear()
        again.state.evaluator._known.clear()
        assert run_round(again.state, number, again.engine).row.results == row.results


def test_a_model_that_is_gone_back_to_is_tested_with_statistics_of_its_own(simulate, monkeypatch):
    """what clients passed through their parts of the model that was given up is not taken for it"""
    values = {**CNN, "norm_policy": "static-slices", "levels": "1,0.5,0.5", "server_finetune_steps": 1}
    made, again = (simulate(1, **values) for _ in range(2))
    before = made.server.state
    for each in (made, again):
        spoilt = {name: torch.full_like(t, torch.nan) if t.is_floating_point() else t for name, t in each.server.state.items()}
        monkeypatch.setattr(each.server, "train", lambda *_, spoilt=spoilt, **__: spoilt)
    pooled, pool = [], norm_statistics.pool_passes
    found = run_round(made.state, 2, made.engine).row.results

    def forget(now):
        pooled.append(pool(now))
        now.passes = []
        return pooled[-1]

    monkeypatch.setattr(norm_statistics, "pool_passes", forget)
    assert run_round(again.state, 2, again.engine).row.results == found
    assert pooled
    assert made.server.state is before
