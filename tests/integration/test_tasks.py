"""Whole runs of tasks that are no classification."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import hetfl
from helpers.ray_nodes import begins_ray
from helpers.runs import DECODER, FOUR_CLIENTS
from hetfl.config import resolve
from hetfl.data.kinds import find_kind
from hetfl.errors import NotApplicable, UsageError
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import runner
from hetfl.runs.folder import RunFolder

FEW = {"clients": 3, "rounds": 1, "epochs": 1, "levels": "1,0.5,0.5", "partition": "iid", "workers": 1, "seed": 1}

TINY = {**DECODER, "pretrain_steps": 10}


def test_a_language_model_learns_and_is_loaded_again():
    run = hetfl.run(data="dialects", extract="heterofl", limit=200, **FEW, **TINY)
    row = run.metrics.iloc[-1]
    assert row["global@test loss"] < math.log(26) - 0.05
    assert row["global@test perplexity"] == pytest.approx(math.exp(row["global@test loss"]))
    assert (run.summary["metric"], run.summary["accuracy"]["global@test"]["perplexity"]) == (
        "token accuracy",
        row["global@test perplexity"],
    )
    assert "global@own masked" not in run.metrics
    ids = torch.ones(2, 32, dtype=torch.int64)
    assert run.model(ids).shape == run.submodel(0.5)(ids).shape == (2, 32, 26)


@pytest.mark.parametrize("extract", ["fjord", "heterofl"])
@pytest.mark.parametrize("task", ["regress", "multilabel"])
def test_numbers_and_labels_are_learned(task, extract):
    torch.manual_seed(0)
    x = torch.randn(300, 4)
    y = x @ torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0]])
    run = hetfl.run(
        data=(x, y if task == "regress" else (y > 0).long()), extract=extract, aggregate="kld", model="mlp", pretrain_steps=60,
        model_args={"hidden": [16]}, set={"fjord": {"distill": True}} if extract == "fjord" else {}, **{**FEW, "epochs": 5},
    )  # fmt: skip
    assert run.summary["metric"] == find_kind(task).metric
    assert run.metrics.iloc[-1]["global@test"] > 0.6
    assert run.options.task == task
    assert run.model(x[:2]).shape == (2, 2)


def test_a_score_below_zero_is_taken_for_what_it_is():
    """R2 of a model that knows nothing is about 0 or below: neither the client nor its evaluation is left out."""
    torch.manual_seed(0)
    run = hetfl.run(
        data=(torch.randn(200, 4), torch.randn(200, 1)), extract="heterofl", model="mlp", lr=0.2, **{**FEW, "epochs": 9}
    )
    row = run.metrics.iloc[-1]
    assert row["client@own"] < 0
    assert row["submodel@own"] < 0.3
    assert row["left out"] == 0


@pytest.mark.parametrize(
    "chosen",
    [{"wrap": "maskloss"}, {"extract": "scalefl"}, {"extract": "fedmd", "aggregate": "fedmd"}, {"aggregate": "fedproto"}],
    ids=lambda c: [*c.values()][-1],
)
def test_what_makes_no_sense_for_tokens_says_so(chosen):
    with pytest.raises(NotApplicable, match=r"is for task classify.*, and this is lm: .+"):
        hetfl.run(data="dialects", limit=60, **{"extract": "heterofl", **FEW, **TINY, **chosen})


def test_a_classifier_does_not_fit_a_language_model():
    with pytest.raises(UsageError, match=r"logits of shape \(2, 32, 26\) are needed"):
        hetfl.run(data="dialects", limit=60, model="encoder", extract="heterofl", **FEW)


ELSEWHERE = {  # plugins that ask the kind for losses and divergences
    "lm": {"dataset": "dialects", "extract": "fjord", "set": {"fjord": {"distill": True}}, **TINY},
    "regress": {"dataset": "digits", "task": "regress", "extract": "scalefl", "aggregate": "kld", "set": {"kld": {"steps": 2}}},
    "multilabel": {"extract": "depthfl"},
}


@pytest.fixture
def run_on(tmp_path):
    """The folder of a run of a kind on an engine: `run_on("lm", "ray")`."""
    x = np.random.default_rng(0).normal(size=(120, 4)).astype("float32")
    (tmp_path / "labels").mkdir()
    for split in ("train", "test"):
        np.savez(tmp_path / "labels" / f"{split}.npz", x=x, y=(x[:, :3] > 0).astype("int64"))

    def run(kind, engine):
        data = {"dataset": str(tmp_path / "labels"), "model": "mlp", "model_args": {"hidden": [8]}, **ELSEWHERE[kind]}
        few = {"limit": 80, "clients": 2, "levels": "1,0.5", "rounds": 1, "pretrain_steps": 2, "workers": 1}
        options = resolve({**FOUR_CLIENTS, **data, **few, "on_client_error": "fail", "engine": engine})
        summary = runner.run(options, RunFolder(tmp_path / f"{kind} {engine}").open(), NoCallback())
        assert summary["metric"] == find_kind(kind).metric
        return tmp_path / f"{kind} {engine}"

    return run


@pytest.mark.slow
@begins_ray
def test_every_kind_gives_the_bits_of_the_local_engine_on_ray(run_on, stops):
    import ray

    from hetfl.engines.ray import connect

    connect("local", [], 1)  # one for all kinds: a run uses the Ray that is there
    try:
        assert [kind for kind in ELSEWHERE if not stops.equal(run_on(kind, "local"), run_on(kind, "ray"))] == []
    finally:
        ray.shutdown()


@pytest.mark.slow
@begins_ray
def test_a_language_model_gives_the_bits_of_the_local_engine_on_flowers_simulation(run_on, stops):
    assert stops.equal(run_on("lm", "local"), run_on("lm", "flower-sim"))
