"""The pool of recorded steps; what a GPU records is tested in tests/integration/test_cuda.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hetfl.config import resolve
from hetfl.data.kinds import CLASSIFY
from hetfl.models.state import tensors
from hetfl.models.zoo import ZOO
from hetfl.training import cuda_graphs
from hetfl.training.cuda_graphs import GraphedSteps, GraphPool
from hetfl.training.device import fits_on_device


def mlp(hidden):
    return ZOO["mlp"](classes=3, channels=1, size=6, hidden=(hidden,))


def borrowed(pool, model, clients=2, round=1):
    """The steps that the pool lends, after they were given back."""
    options = resolve({"lr_milestones": [1], "lr_decay": 0.5})
    with pool.borrow(model, [tensors(model)] * clients, options, round, 4, CLASSIFY) as steps:
        return steps


def test_steps_are_used_again_for_the_same_shape_number_and_learning_rate_alone():
    pool, model = GraphPool(), mlp(5)
    first = borrowed(pool, model)
    assert borrowed(pool, mlp(5)) is first
    assert borrowed(pool, model, clients=3) is not first
    assert borrowed(pool, mlp(6)) is not first
    assert borrowed(pool, model, round=2) is not first
    assert borrowed(pool, model) is first


def test_two_at_a_time_get_steps_of_their_own_that_start_from_their_clients():
    pool, model = GraphPool(), mlp(5)
    state, other = tensors(model), {name: t + 1 for name, t in tensors(model).items()}
    with (
        pool.borrow(model, [state, state], resolve({}), 1, 4, CLASSIFY) as one,
        pool.borrow(model, [state, other], resolve({}), 1, 4, CLASSIFY) as two,
    ):
        assert one is not two
        assert all(
            torch.equal(found[n], t)
            for found, t_of in zip(two.stack.states(), (state, other), strict=True)
            for n, t in t_of.items()
        )


def test_steps_that_failed_are_not_lent_again_and_the_pool_stays_small(monkeypatch):
    pool, model = GraphPool(), mlp(5)
    state = tensors(model)
    with pytest.raises(RuntimeError, match="no memory"), pool.borrow(model, [state], resolve({}), 1, 4, CLASSIFY) as failed:
        raise RuntimeError("no memory")
    assert borrowed(pool, model, clients=1) is not failed
    monkeypatch.setattr(cuda_graphs, "KEPT", 2)
    oldest = borrowed(pool, model, clients=2)
    for clients in (3, 4):
        borrowed(pool, model, clients=clients)
    assert borrowed(pool, model, clients=2) is not oldest


def test_a_round_stays_in_main_memory_on_a_cpu():
    assert not fits_on_device("cpu", 1)


@pytest.mark.parametrize(("width", "widths", "recorded"), [
    (0, [8, 8, 3] * 6, 8),  # one by one: whole batches, not the last ones
    (0, [8, 8, 3], 0),  # too few of any
    (8, [8, 8, 3] * 6, 8),
    (5, [5, 2] * 6, 5),  # no batch is whole: each is padded to the widest
    (0, [], 0),
])  # fmt: skip
def test_wrapped_steps_are_recorded_for_the_most_frequent_width(monkeypatch, width, widths, recorded):
    made = []
    monkeypatch.setattr(cuda_graphs, "GraphedSteps", lambda *given: made.append(given) or GraphedSteps(*given))
    task = SimpleNamespace(model=mlp(5), masks={}, loss=CLASSIFY.loss, kind=CLASSIFY, constants={}, penalties=[], forward=None)
    with GraphPool().make([task], resolve({"batch_size": 8}), 1, width, widths) as steps:
        assert steps._width == width
    assert made[0][-1] == recorded
