"""What stays with clients, what they prune, and what strategies promise over whole rounds."""

from __future__ import annotations

import re

import pytest
import torch

from hetfl.aggregation.mean import mean
from hetfl.errors import UsageError
from hetfl.models.early_exit import every
from hetfl.models.state import tensors
from hetfl.plugins.methods import lotteryfl
from hetfl.rounds import validation
from hetfl.rounds.client import ClientRuntime, client_id
from hetfl.submodel import encoding
from hetfl.submodel.plan import OwnModel, Selection
from hetfl.training import local as train


def states(made):
    return {name: tensor.clone() for name, tensor in made.server.state.items()}


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def sent_and_got(monkeypatch):
    """(client, model before, model after, masks) of every local training, innermost."""
    seen, whole = [], train.fit

    def fit(task):
        before = {n: t.clone() for n, t in tensors(task.model).items()}
        reply = whole(task)
        seen.append((task.client, task.round, before, {n: t.clone() for n, t in reply.state.items()}, dict(task.masks)))
        return reply

    monkeypatch.setattr(train, "fit", fit)
    return seen


def test_standalone_sends_nothing_and_depends_on_nobody_else(simulate, monkeypatch):
    """spec baselines O4"""
    seen = sent_and_got(monkeypatch)
    made = simulate(extract="standalone", aggregate="overlap")
    assert all(row["bytes down"] == row["bytes up"] == 0 for row in made.rounds.client_rows)
    assert same(made.server.state, made.rounds.first)
    alone = {round: after for client, round, _, after, _ in seen if client == 1}
    for client, round, before, *_ in seen:
        if client == 1 and round > 1:
            assert same(before, alone[round - 1])
    seen.clear()
    data = made.federation.clients[0].train
    fewer = simulate(extract="standalone", aggregate="overlap", steps=0)
    holding = fewer.federation.clients[0]
    object.__setattr__(holding, "train", type(data)(data.x, data.y, data.index[: len(data) // 2]))
    for round in (1, 2, 3):
        fewer.rounds.step(round, fewer.grid)
    assert all(same(after, alone[round]) for client, round, _, after, _ in seen if client == 1)
    assert "personal@own" in made.rounds.rows[-1]


def test_standalone_may_start_from_the_server(simulate):
    made = simulate(extract="standalone", aggregate="overlap", set={"standalone": {"start": "server"}})
    down = {row["round"]: row["bytes down"] for row in made.rounds.client_rows}
    assert down[1] > 0 == down[2] == down[3]


def test_serveralone_does_not_look_at_clients(simulate):
    """spec baselines O5"""
    made = simulate(extract="serveralone", aggregate="overlap", server_data=0.4)
    other = simulate(extract="serveralone", aggregate="overlap", server_data=0.4, epochs=3, lr=0.5)
    assert same(made.server.state, other.server.state)
    assert not same(made.server.state, made.rounds.first)
    assert made.rounds.client_rows == []


def test_exclusive_lets_small_clients_sit_out(simulate):
    made = simulate(extract="exclusive", aggregate="fedavg")
    assert {row["client"] for row in made.rounds.client_rows} == {0}
    none = simulate(extract="exclusive", aggregate="fedavg", levels="0.5")
    assert same(none.server.state, none.rounds.first)
    assert any("no client could afford" in note for note in none.server.notes)


def test_local_layers_of_lg_never_move_and_are_never_sent_again(simulate, monkeypatch):
    """spec baselines O2, O3: all layers shared is uniform FedAvg, none is standalone from the server's start"""
    seen = sent_and_got(monkeypatch)
    made = simulate(extract="lgfedavg", aggregate="overlap", levels="1", set={"lgfedavg": {"layers": 1}})
    local = [n for n in made.server.state if not n.startswith("5.")]
    assert all(torch.equal(made.server.state[n], made.rounds.first[n]) for n in local)
    assert not torch.equal(made.server.state["5.weight"], made.rounds.first["5.weight"])
    mine = {(client, round): (before, after) for client, round, before, after, _ in seen}
    for client in range(3):
        assert all(torch.equal(mine[client, 2][0][n], mine[client, 1][1][n]) for n in local)
    assert torch.equal(mine[0, 2][0]["5.weight"], mine[2, 2][0]["5.weight"])
    once = simulate(extract="lgfedavg", aggregate="overlap", levels="1", set={"lgfedavg": {"layers": 1}}, steps=1)
    assert all(set(s.travels) == {"5.weight", "5.bias"} for s in once.rounds._sent.values())  # as evaluated after round 1
    down = [row["bytes down"] for row in made.rounds.client_rows if row["client"] == 0]
    assert down[0] > 3 * down[1]
    assert down[1] == down[2]
    everything = simulate(extract="lgfedavg", aggregate="overlap", levels="1", set={"lgfedavg": {"layers": 9}})
    fedavg = simulate(extract="full", aggregate="overlap", levels="1")
    assert same(everything.server.state, fedavg.server.state)
    none = simulate(extract="lgfedavg", aggregate="overlap", levels="1", set={"lgfedavg": {"layers": 0}})
    assert same(none.server.state, none.rounds.first)


def test_fedmd_sends_scores_and_no_parameters(simulate):
    """spec fedmd O4 and properties"""
    made = simulate(extract="fedmd", aggregate="fedmd", set={"fedmd": {"public_epochs": 1}}, server_data=0.3)
    rows, classes = len(made.server.public.tune), made.server.classes
    array = encoding.payload_bytes({"scores": torch.zeros(rows, classes)})
    assert array - encoding.payload_bytes({"scores": torch.zeros(0, classes)}) == rows * classes * 4
    assert all(row["bytes up"] == array for row in made.rounds.client_rows)
    assert encoding.payload_bytes({"s": torch.zeros(5000, 16)}) - encoding.payload_bytes({"s": torch.zeros(1, 16)}) == 4999 * 16 * 4
    assert "personal@own" in made.rounds.rows[-1]


def test_fedmd_of_foreign_architectures(simulate):
    models = {"fedmd": {"models": {"0.5": "fedconv-cnn"}, "public_epochs": 1}}
    options = {"extract": {"fedmd": {"models": {"0.5": "fedconv-cnn"}}}}
    made = simulate(extract="fedmd", aggregate="fedmd", set=options)
    assert isinstance(made.rounds._sent[1].plan, OwnModel)
    clustered = simulate(extract="fedmd", aggregate="cluster", set=options)
    branch = clustered.server.branches["level 0.5"]
    assert any(name.startswith("fedconv-cnn:") for name in branch)
    assert "personal@own" in clustered.rounds.rows[-1]
    again = simulate(extract="fedmd", aggregate="cluster", set=options, workers=1)
    assert same({n: p.values for n, p in branch.items()}, {n: p.values for n, p in again.server.branches["level 0.5"].items()})
    with pytest.raises(UsageError, match="not applicable: the clients of 'fedmd' have architectures of their own"):
        simulate(extract="fedmd", aggregate="overlap", set=options)
    assert models


def test_lottery_rewinds_to_the_first_model_and_keeps_dead_weights_dead(simulate, monkeypatch):
    """spec lotteryfl O4, O5 and properties"""
    seen = sent_and_got(monkeypatch)
    monkeypatch.setattr(lotteryfl, "hold_out_and_score", lambda task: 1.0)
    made = simulate(extract="lotteryfl", aggregate="overlap", levels="0.5", set={"lotteryfl": {"target": 0.6}})
    first, masks = made.rounds.first, {}
    remaining = {1: 0.8, 2: 0.64, 3: 0.512}
    for client, round, before, after, mask in seen:
        assert set(mask) == {"1.weight", "3.weight", "5.weight"}
        for name, m in mask.items():
            assert torch.equal(before[name], first[name] * m)
            assert after[name][~m].eq(0).all()
            assert bool((masks.get((client, name), m) | ~m).all())
            assert float(m.float().mean()) == pytest.approx(remaining[round], abs=0.03)
            masks[client, name] = m
        assert torch.equal(before["1.bias"], first["1.bias"])


def test_lottery_does_not_prune_at_the_threshold_itself(simulate, monkeypatch):
    """spec lotteryfl O5"""
    monkeypatch.setattr(lotteryfl, "hold_out_and_score", lambda task: 0.4)
    for threshold, pruned in ((0.4, False), (0.39, True)):
        made = simulate(
            extract="lotteryfl", aggregate="overlap", levels="0.5", steps=1, set={"lotteryfl": {"threshold": threshold}}
        )
        assert bool(made.rounds._sent[0].plan.masks) == pruned


def test_a_client_met_late_gets_the_first_model_too(simulate):
    made = simulate(extract="lotteryfl", aggregate="overlap", fraction=0.34, rounds=4, set={"lotteryfl": {"threshold": 0.0}})
    late = [
        row
        for row in made.rounds.client_rows
        if row["round"] == min(r["round"] for r in made.rounds.client_rows if r["client"] == row["client"])
    ]
    first = next(row for row in late if row["round"] == 1)
    assert any(row["bytes down"] > 1.5 * first["bytes down"] for row in late if row["round"] > 1)


def test_hermes_drops_whole_channels_and_ends_on_its_budget(simulate):
    """spec hermes properties: nesting, whole groups, ends clamped on the target"""
    made = simulate(extract="hermes", aggregate="hermes", rounds=8, steps=0, set={"extract": {"hermes": {"threshold": 0.0}}})
    kept = {}
    for round in range(1, 9):
        made.rounds.step(round, made.grid)
        for client, sent in made.rounds._sent.items():
            plan = sent.plan
            assert isinstance(plan, Selection)
            for name, units in plan.kept.items():
                assert set(units.tolist()) <= set(kept.get((client, name), units).tolist())
                kept[client, name] = units
    assert made.rounds._sent[0].plan.sizes == {"1": 8, "3": 6}
    assert made.rounds._sent[1].plan.sizes == {"1": 4, "3": 3}
    assert set(made.server.branches) == {"client 0", "client 1", "client 2"}
    down = [row["bytes down"] for row in made.rounds.client_rows if row["client"] == 1]
    assert down[-1] < down[0]


def test_fiarse_changes_nothing_outside_its_mask(simulate, monkeypatch):
    """spec fiarse properties"""
    seen = sent_and_got(monkeypatch)
    simulate(extract="fiarse", aggregate="fiarse")
    assert seen
    for client, _, before, after, masks in seen:
        assert bool(masks)
        assert all(torch.equal(after[n][~m], before[n][~m]) for n, m in masks.items())
        if client == 1:
            assert any(int((~m).sum()) for m in masks.values())


def test_fiarse_of_full_budgets_without_its_bias_is_fedavg(simulate):
    """spec fiarse properties"""
    ours = simulate(extract="fiarse", aggregate="fiarse", levels="1", set={"extract": {"fiarse": {"biased": False}}})
    theirs = simulate(extract="full", aggregate="overlap", levels="1")
    assert all(torch.allclose(ours.server.state[n], t, atol=1e-6) for n, t in theirs.server.state.items())
    biased = simulate(extract="fiarse", aggregate="fiarse", levels="1")
    assert not all(torch.allclose(biased.server.state[n], t, atol=1e-6) for n, t in theirs.server.state.items())


@pytest.mark.parametrize("by", ["layer", "neuron"])
def test_other_granularities_of_fiarse(simulate, by):
    made = simulate(extract="fiarse", aggregate="fiarse", set={"extract": {"fiarse": {"by": by}}})
    plan = made.rounds._sent[1].plan
    assert (plan.sizes == {"1": 4, "3": 3}) == (by == "neuron")
    assert bool(plan.masks) == (by == "layer")


def test_tailor_keeps_capacity_and_shares_its_lower_groups(simulate):
    """spec tailorfl properties"""
    made = simulate(
        extract="tailorfl", aggregate="tailorfl", rounds=5, steps=0, set={"extract": {"tailorfl": {"steps": 2, "tune": 0.5}}}
    )
    for round in range(1, 6):
        made.rounds.step(round, made.grid)
        plans = {client: sent.plan for client, sent in made.rounds._sent.items()}
        if round == 1:
            assert all(row["bytes up"] < row["bytes down"] / 3 for row in made.rounds.client_rows)
            assert same(made.server.state, made.rounds.first)
            continue
        assert plans[1].sizes == plans[2].sizes == {"1": 4, "3": 3}
        assert torch.equal(plans[1].kept["1"], plans[2].kept["1"])
    assert not same(made.server.state, made.rounds.first)


def test_dac_snapshots_nest_and_stay_below_their_budgets(simulate):
    """spec dac properties"""
    from hetfl.plugins.methods.dac import count_units as lengths
    from hetfl.plugins.methods.dac import measure_cost as price

    made = simulate(extract="dac", aggregate="cluster", levels="1,0.7,0.4", steps=1, set={"dac": {"epochs": 1}})
    plugin = made.plugins.plugins["extract.dac"]
    kept = plugin._kept
    assert list(kept) == [1.0, 0.7, 0.4]
    for large, small in ((1.0, 0.7), (0.7, 0.4)):
        assert all(set(kept[small][name].tolist()) <= set(kept[large][name].tolist()) for name in kept[small])
        budget = price(made.server, {name: len(u) for name, u in made.server.widths.prefix(small).items()})
        ours = price(made.server, lengths(kept[small]))
        assert ours[0] < budget[0]
        assert ours[1] < budget[1]
    assert {"level 0.7", "level 0.4"} <= set(made.server.branches)
    assert same(plugin.state_dict(), loaded(plugin).state_dict())


def loaded(plugin):
    other = type(plugin)()
    other.load_state_dict(plugin.state_dict())
    return other


@pytest.mark.parametrize("extract", ["lotteryfl", "hermes", "tailorfl"])
def test_what_an_extraction_keeps_goes_through_its_state(simulate, extract):
    made = simulate(
        extract=extract,
        aggregate="overlap",
        steps=2,
        set={extract: {"threshold": 0.0}} if extract in ("lotteryfl", "hermes") else {},
    )
    plugin = made.plugins.plugins[f"extract.{extract}"]
    assert plugin.state_dict()
    assert same(plugin.state_dict(), loaded(plugin).state_dict())


def test_deep_exits_stay_when_only_shallow_clients_train(simulate):
    """spec scalefl O5"""
    made = simulate(extract="scalefl", aggregate="overlap", levels="0.5", model="fedconv-cnn", model_args={})
    depth = made.rounds._sent[0].plan.depth
    deeper = set(made.server.state) - made.server.builder.model.names(depth)
    assert deeper
    assert all(torch.equal(made.server.state[n], made.rounds.first[n]) for n in deeper)
    assert not same(made.server.state, made.rounds.first)
    with every(made.server.builder.module()):
        pass


def test_a_model_may_bring_its_own_exits(simulate, monkeypatch):
    from hetfl.models import zoo as models
    from hetfl.models.early_exit import with_exits

    def net(classes, channels, size):
        return with_exits(models.FedConvCNN(classes, channels, size), torch.randn(2, channels, size, size), classes, 2, 0)

    monkeypatch.setitem(models.ZOO, "exitnet", net)
    made = simulate(extract="scalefl", aggregate="overlap", model="exitnet", model_args={})
    assert made.server.builder.model.depth == 2


@pytest.mark.parametrize(
    ("kept", "masks", "fault"),
    [
        ({"1": torch.tensor([0, 9])}, {}, "it kept units of group '1' that it was not sent"),
        ({"1": torch.tensor([0, 0])}, {}, "it kept units of group '1' that it was not sent"),
        ({"1": torch.tensor([], dtype=torch.long)}, {}, "it kept units of group '1' that it was not sent"),
        ({"1": torch.tensor([0.5])}, {}, "is no list of units"),
        ({"x": torch.tensor([0])}, {}, "what it kept of 'x' is no list of units of a group"),
        ({"1": torch.tensor([0, 1])}, {}, r"tensor 1.weight is \(8, 64\)"),
        ({}, {"1.weight": torch.ones(2, dtype=torch.bool)}, "its mask of '1.weight' is no mask of a tensor"),
        ({}, {"nope": torch.ones(2, dtype=torch.bool)}, "its mask of 'nope' is no mask of a tensor"),
        ({}, {"1.bias": torch.ones(8)}, "its mask of '1.bias' is no mask of a tensor"),
    ],
)
def test_a_reply_that_cut_wrongly_is_left_out(simulate, monkeypatch, kept, masks, fault):
    whole = ClientRuntime.train

    def answer(self, message, context):
        reply = whole(self, message, context)
        if client_id(context) == 0:
            reply.kept, reply.masks = kept, masks
        return reply

    monkeypatch.setattr(ClientRuntime, "train", answer)
    made = simulate(extract="full", aggregate="overlap", cohorts="off", steps=1)
    (row,) = [r for r in made.rounds.client_rows if "fault" in r]
    assert row["client"] == 0
    assert re.search(fault, row["fault"])


def test_a_mask_wider_than_sent_is_refused():
    both, one = torch.tensor([True, True]), torch.tensor([True, False])
    assert "wider" in validation.mask_fault({"w": both}, {"w": one}, {"w": torch.zeros(2)})
    assert validation.mask_fault({"w": one}, {"w": both}, {"w": torch.zeros(2)}) is None


def test_a_tensor_that_nobody_sent_keeps_its_value():
    from hetfl.aggregation.updates import Update, Updates
    from hetfl.submodel.plan import Patch

    old = {"a": torch.zeros(2), "b": torch.ones(2), "n": torch.tensor(3)}
    updates = Updates([Update(0, {"a": Patch(torch.tensor([4.0, 4]))}, 1.0), Update(1, {}, 1.0)], old)
    new = mean(updates, [1.0, 1.0])
    assert new["a"].tolist() == [4, 4]
    assert torch.equal(new["b"], old["b"])
    assert new["n"] == 3
    assert updates.column("b")[1].sum() == 0
