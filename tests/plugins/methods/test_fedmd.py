"""FedMD against its spec's oracles and properties."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from helpers.oracles import T, close
from helpers.states import same
from hetfl import Update
from hetfl.errors import UsageError
from hetfl.plugins.methods import fedmd
from hetfl.rounds.loop import run_round
from hetfl.submodel import encoding
from hetfl.submodel.plan import OwnModel

SCORES = [T([[2.0, 0], [0, 1]]), T([[0.0, 2], [1, 0]]), T([[1.0, 1], [2, 2]])]


def test_fedmd_consensus():
    """spec fedmd O1, O5"""
    assert fedmd.average_scores(SCORES).tolist() == [[1, 1], [1, 1]]
    assert fedmd.average_scores(SCORES, [0.5, 0.5, 0.0]).tolist() == [[1, 1], [0.5, 0.5]]
    assert torch.equal(fedmd.average_scores(SCORES), fedmd.average_scores(SCORES[::-1]))
    assert close(fedmd.average_scores([s + 3 for s in SCORES]), fedmd.average_scores(SCORES) + 3)
    holes = [*SCORES, torch.full((2, 2), float("nan"))]
    assert torch.equal(fedmd.average_scores(holes), fedmd.average_scores(SCORES))


def test_fedmd_digest_loss():
    """spec fedmd O2, O3"""
    agreed = fedmd.average_scores(SCORES)
    assert fedmd.DISTANCES["mae"](SCORES[0], agreed).item() == 0.75
    assert fedmd.DISTANCES["mse"](SCORES[0], agreed).item() == 0.75
    same = SCORES[0].clone().requires_grad_()
    loss = fedmd.DISTANCES["mae"](same, fedmd.average_scores([SCORES[0]] * 3))
    loss.backward()
    assert loss == 0
    assert same.grad.eq(0).all()


def test_fedmd_stratified():
    public = SimpleNamespace(y=T([0] * 30 + [1] * 10), index=torch.arange(40))
    rows = fedmd.draw_stratified(public.y, 8, torch.Generator().manual_seed(0))
    assert len(rows) == 8 == len(rows.unique())
    assert public.y[rows].bincount().tolist() == [6, 2]
    assert fedmd.draw_stratified(public.y, 100, torch.Generator()).tolist() == list(range(40))


def test_a_digest_brings_clients_closer_together(simulate, monkeypatch):
    """spec fedmd properties: where clients do nothing but digest, what they say moves towards the consensus"""
    spreads, average = [], fedmd.average_scores

    def watched(scores):
        agreed = average(scores)
        spreads.append(float(torch.stack([s - agreed for s in scores]).abs().mean()))
        return agreed

    monkeypatch.setattr(fedmd, "average_scores", watched)
    options = {"public_epochs": 0, "digest_epochs": 5, "lr": 0.01, "distill_steps": 0}
    simulate(3, extract="fedmd", aggregate="fedmd", levels="1,0.5,0.25", lr=1e-30, set={"fedmd": options})
    assert spreads[0] > 1.2 * spreads[1] > 1.2 * spreads[2] > 0


def test_fedmd_sends_scores_and_no_parameters(simulate):
    """spec fedmd O4 and properties"""
    made = simulate(extract="fedmd", aggregate="fedmd", set={"fedmd": {"public_epochs": 1}}, server_data=0.3)
    rows, classes = len(made.server.public.tune), made.server.classes
    array = encoding.payload_bytes({"scores": torch.zeros(rows, classes)})
    assert array - encoding.payload_bytes({"scores": torch.zeros(0, classes)}) == rows * classes * 4
    assert all(row["bytes up"] == array for row in made.state.client_rows)
    assert encoding.payload_bytes({"s": torch.zeros(5000, 16)}) - encoding.payload_bytes({"s": torch.zeros(1, 16)}) == 4999 * 16 * 4
    assert "personal@own" in made.state.rows[-1]


def test_a_fraction_digests_the_consensus_of_the_round_before(simulate, monkeypatch):
    """The page's words: who takes part now need not have had a say in it; the paper's clients all have."""
    said, digested, average, batches = [], [], fedmd.average_scores, fedmd.shuffle_batches

    def watched(x, goal, *rest):
        digested.extend([(len(said), goal)] if goal.is_floating_point() else [])
        return batches(x, goal, *rest)

    monkeypatch.setattr(fedmd, "average_scores", lambda scores: said.append(average(scores)) or said[-1])
    monkeypatch.setattr(fedmd, "shuffle_batches", watched)
    values = {"clients": 6, "fraction": 0.34, "levels": "1", "set": {"fedmd": {"public_epochs": 1}}}
    made = simulate(0, extract="fedmd", aggregate="fedmd", **values)
    asked = [{*run_round(made.state, r, made.engine).assignments} for r in range(1, 5)]
    assert len(set.union(*asked)) > 3
    assert [rounds for rounds, _ in digested] == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert all(torch.equal(goal, said[rounds - 1]) for rounds, goal in digested)
    assert any("the consensus of those who took part in the round before" in note for note in made.server.notes)
    assert not any("fedmd" in note for note in simulate(0, extract="fedmd", aggregate="fedmd").server.notes)


def test_fedmd_of_foreign_architectures(simulate):
    options = {"extract": {"fedmd": {"models": {"0.5": "fedconv-cnn"}}}}
    made = simulate(extract="fedmd", aggregate="fedmd", set=options)
    assert isinstance(made.last.assignments[1].plan, OwnModel)
    clustered = simulate(extract="fedmd", aggregate="cluster", set=options)
    branch = clustered.server.branches["level 0.5"]
    assert any(name.startswith("fedconv-cnn:") for name in branch)
    assert "personal@own" in clustered.state.rows[-1]
    again = simulate(extract="fedmd", aggregate="cluster", set=options, workers=1)
    assert same({n: p.values for n, p in branch.items()}, {n: p.values for n, p in again.server.branches["level 0.5"].items()})
    with pytest.raises(UsageError, match="not applicable: the clients of 'fedmd' have architectures of their own"):
        simulate(extract="fedmd", aggregate="overlap", set=options)


def test_a_client_whose_model_is_another_digests_with_a_new_adam(simulate):
    options = {"aggregate": {"fedmd": {"public_epochs": 1, "digest_epochs": 1}}}
    made = simulate(0, extract="fedmd", aggregate="fedmd", levels="1,0.5,0.5", set=options)
    steps = []
    for number, mix in ((1, "1,0.5,0.5"), (2, "1,0.5,0.5"), (3, "1,0.5,0.5"), (4, "0.5,1,1")):
        made.plugins.plugins["profile.levels"].mix = mix
        run_round(made.state, number, made.engine)
        steps.append(float(made.engine.client_states()[0]["memory"].get("digest/1.weight/step", torch.zeros(()))))
    assert not any("fault" in row for row in made.state.client_rows)
    assert steps == [0, 1, 2, 1]


def test_scores_of_another_shape_have_no_say(simulate):
    server, plugin = simulate(0, extract="fedmd", aggregate="fedmd").server, fedmd.Consensus(distill_steps=0)
    right = torch.rand(len(plugin._draw_rows(server, 1)), server.classes)
    said = {0: right, 1: right[:2], 2: right[:, :2]}
    plugin.aggregate(server, [Update(c, {}, 1.0, {"scores": scores}) for c, scores in said.items()], 1)
    assert torch.equal(plugin.state_dict()["consensus"], right)
