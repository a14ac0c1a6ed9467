"""Clients trained as one: what each would come to alone, and who cannot."""

from __future__ import annotations

import weakref
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.states import same
from hetfl import Plugin, hookimpl
from hetfl.config import resolve
from hetfl.data.dataset import Examples
from hetfl.models.state import copy_state, load_state, tensors
from hetfl.models.zoo import ZOO
from hetfl.rng import stream
from hetfl.rounds.loop import run_round
from hetfl.runs.given import Given
from hetfl.submodel.builder import to_fast_layout
from hetfl.training import evaluation, local, stacking, vectorized
from hetfl.training.cuda_graphs import GraphPool
from hetfl.training.vectorized import Member

SMALL_NETS = {
    "mlp": lambda: ZOO["mlp"](classes=3, channels=1, size=6, hidden=(5,)),
    "fedconv-cnn": lambda: ZOO["fedconv-cnn"](classes=3, channels=1, size=6, widths=(3, 4)),
    "cnn": lambda: ZOO["cnn"](classes=3, channels=1, widths=(3, 4)),
}


def alone(model, member, options):
    """One client's training by itself, as `local.fit` does it."""
    load_state(model, member.state).train()
    optimizer = local.make_optimizer(model, options, 1)
    for rows in local.batch_rows(member.train, options, stream(0, "batches", 1, member.client), model):
        optimizer.zero_grad()
        last = nn.functional.cross_entropy(model(member.train.x[rows]), member.train.y[rows])
        last.backward()
        if options.clip:
            nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
    return copy_state(model), last.item()


@pytest.mark.parametrize("fixed", [False, True])  # in fixed places: what a GPU records
@pytest.mark.parametrize("net", SMALL_NETS)
@settings(deadline=None, max_examples=5)
@given(
    counts=st.lists(st.integers(2, 23), min_size=2, max_size=4), epochs=st.integers(1, 3), batch=st.integers(2, 9),
    momentum=st.sampled_from([0.0, 0.9]), clip=st.sampled_from([0.0, 0.3]), optimizer=st.sampled_from(["sgd", "adam"]),
)  # fmt: skip
def test_a_vmap_group_trains_as_its_clients_would_alone(net, fixed, counts, epochs, batch, momentum, clip, optimizer):
    torch.manual_seed(0)
    model = to_fast_layout(SMALL_NETS[net]().double())  # in single precision rounding may turn a ReLU or a maximum the other way
    if not vectorized.allows_padding(model):
        counts = counts[:1] * len(counts)
    x, y = torch.randn(40, 1, 6, 6).double(), torch.arange(40) % 3
    if net == "cnn":  # biases before a batch norm have no gradient but rounding, which Adam would blow up
        optimizer = "sgd"
    values = {"epochs": epochs, "batch_size": batch, "momentum": momentum, "clip": clip, "optimizer": optimizer, "lr": 0.01}
    options = resolve(values)
    state = {name: t.clone() for name, t in tensors(model).items()}
    members = [Member(i, state, Examples(x, y, torch.randperm(40)[:n].sort().values)) for i, n in enumerate(counts)]
    pool = GraphPool() if fixed else None
    vectorized.train(model, members[::-1], options, 1, pool)  # what another group leaves behind is to be gone
    together = vectorized.train(model, members, options, 1, pool)
    for member, trained in zip(members, together, strict=True):
        wanted, loss = alone(model, member, options)
        assert trained.loss == pytest.approx(loss, rel=1e-3, abs=1e-4)
        for name, tensor in wanted.items():
            assert torch.allclose(trained.state[name].to(tensor), tensor, rtol=1e-4, atol=1e-5), name


def test_a_vmap_group_scores_as_its_clients_would_alone():
    torch.manual_seed(0)
    model = SMALL_NETS["cnn"]()
    x, y = torch.randn(40, 1, 6, 6), torch.arange(40) % 3
    states = [{n: t + 0.1 * i if t.is_floating_point() else t for n, t in tensors(model).items()} for i in range(3)]
    data = [Examples(x, y, torch.arange(n)) for n in (1, 9, 40)]
    for state, own, score in zip(states, data, stacking.evaluate(model, states, data, 8), strict=True):
        wanted = evaluation.evaluate(load_state(SMALL_NETS["cnn"](), state), own, 8)
        assert score.examples == wanted.examples
        assert score.accuracy == pytest.approx(wanted.accuracy)
        assert score.loss == pytest.approx(wanted.loss, rel=1e-4)


RUN = {"extract": "heterofl", "aggregate": "overlap", "clients": 7, "partition": "dirichlet", "levels": "1:4,0.5:3", "rounds": 2}


def test_vmap_groups_change_a_run_by_rounding_alone_and_never_with_the_workers(simulate):
    off, on, other = (simulate(**RUN, vmap=c, workers=w) for c, w in (("off", 2), ("on", 1), ("on", 2)))
    assert (off.group_size, on.group_size > 1) == (1, True)
    for name, tensor in off.server.state.items():
        assert torch.allclose(on.server.state[name], tensor, rtol=1e-3, atol=1e-4)
        assert torch.equal(on.server.state[name], other.server.state[name])
    for a, b in zip(off.state.client_rows, on.state.client_rows, strict=True):
        assert set(a) == set(b)
        assert a["examples"] == b["examples"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-3)


class Near(Plugin):
    """A third party's: mu / 2 |w - what was sent|^2 is added to the loss (FedProx)."""

    stackable: ClassVar[bool] = True

    @hookimpl(wrapper=True)
    def fit(self, task):
        task.constants |= {f"near/{name}": p.detach().clone() for name, p in task.model.named_parameters()}
        task.penalties.append(
            lambda model: 5 * sum((p - task.constants[f"near/{n}"]).square().sum() for n, p in model.named_parameters())
        )
        reply = yield
        reply.metrics["seen"] = float(task.client)
        return reply


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.lists(st.integers(1, 5), max_size=7), min_size=1, max_size=4), window=st.integers(1, 8), mean=st.booleans()
)
def test_batches_side_by_side_are_each_clients_own_in_order_whatever_the_window(sizes, window, mean):
    orders = [[torch.randint(9, (n,)) for n in each] for each in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacking, "WINDOW", window)
        steps = list(stacking.align_batches(orders, mean))
    assert len(steps) == max(map(len, orders))
    for k, order in enumerate(orders):
        assert [step for step, batch in enumerate(steps) if k in batch.ending] == ([len(order) - 1] if order else [])
        for step, batch in enumerate(steps):
            rows = order[step] if step < len(order) else torch.zeros(0, dtype=torch.int64)
            assert batch.counts[k] == len(rows)
            assert torch.equal(batch.rows[k, : len(rows)], rows)
            assert torch.equal(batch.weights[k, : len(rows)], torch.full((len(rows),), 1 / max(len(rows), 1) if mean else 1.0))
            assert not batch.weights[k, len(rows) :].any()


def groups(made):
    """The number of clients of each group that trained as one, whatever became of it."""
    runtime, found = made.engine._workers._runtime, []
    train = type(runtime).train_group

    def note(clients, *rest):
        replies = train(runtime, clients, *rest)
        found.append(len(clients))
        return replies

    object.__setattr__(runtime, "train_group", note)
    return found


NORMED = {"model": "cnn", "model_args": {"widths": [4, 8]}, "norm_policy": "static", "partition": "iid", "clients": 6, "limit": 246}


@pytest.mark.parametrize("fixed", [False, True])  # in fixed places: what a GPU records
@pytest.mark.parametrize("values", [
    {"wrap": ["scaler", "maskloss"], "alpha": 0.1},
    {"wrap": ["scaler", "maskloss"], **NORMED},
    {"wrap": ["topk", Near]},
], ids=["maskloss and padding", "scaled norms", "a penalty and a codec"])  # fmt: skip
def test_clients_under_stackable_wraps_train_as_one(simulate, monkeypatch, values, fixed):
    given, train = Given(), vectorized.train
    if fixed:
        monkeypatch.setattr(vectorized, "train", lambda m, g, o, r, _, tasks: train(m, g, o, r, GraphPool(), tasks))
    runs = {"off": None, "on": None}
    for vmap in runs:
        made = simulate(steps=0, **{**RUN, **given.names(values)}, vmap=vmap, workers=2)
        seen = groups(made)
        for round in (1, 2):
            run_round(made.state, round, made.engine)
        runs[vmap] = made
    clients = runs["on"].state.clients
    assert (runs["on"].group_size > 1, sum(seen)) == (True, 2 * clients)
    for name, tensor in runs["off"].server.state.items():
        assert torch.allclose(runs["on"].server.state[name], tensor, rtol=1e-2, atol=2e-3), name
    for a, b in zip(runs["off"].state.client_rows, runs["on"].state.client_rows, strict=True):
        assert {k: v for k, v in a.items() if k in ("client", "bytes up", "seen")} == {
            k: v for k, v in b.items() if k in ("client", "bytes up", "seen")
        }
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-2, abs=1e-3)


def test_a_group_that_fails_trains_one_by_one_and_says_so(simulate, monkeypatch):
    made, alone = simulate(steps=0, **RUN, vmap="on"), simulate(steps=0, **RUN, vmap="off")
    monkeypatch.setattr(vectorized, "train", lambda *_: 1 / 0)
    for run in (made, alone):
        run_round(run.state, 1, run.engine)
    said = made.state.rows[-1]["alarms"]
    assert "could not train as one and trained one by one" in said
    assert "division by zero" in said
    assert same(made.server.state, alone.server.state)


def test_what_a_failed_group_held_is_gone_before_its_clients_train(simulate, monkeypatch):
    made, held, seen = simulate(steps=0, **{**RUN, "workers": 1}, vmap="on"), [], []

    def fail(*_):
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise RuntimeError("out of memory")

    def train(task):
        seen.append(any(ref() is not None for ref in held))
        return fit(task)

    fit = made.plugins.fit
    monkeypatch.setattr(vectorized, "train", fail)
    monkeypatch.setattr(made.plugins, "fit", train)
    run_round(made.state, 1, made.engine)
    assert seen == [False] * RUN["clients"]


def test_a_client_that_fails_in_its_group_and_alone_is_said_once(simulate):
    class Failing(Near):
        @hookimpl(wrapper=True)
        def fit(self, task):
            if task.client == 1:
                raise RuntimeError("broken")
            return (yield)

    given = Given()
    made = simulate(steps=0, **{**RUN, "rounds": 1}, **given.names({"wrap": [Failing]}), vmap="on")
    run_round(made.state, 1, made.engine)
    assert "trained one by one" not in made.state.rows[-1].get("alarms", "")
    assert ["fault" in row for row in made.state.client_rows] == [row["client"] == 1 for row in made.state.client_rows]


def test_a_task_with_a_loss_of_its_own_trains_by_itself(simulate):
    class Odd(Near):
        @hookimpl(wrapper=True)
        def fit(self, task):
            task.loss = lambda out, y: 0 * out.sum()
            return (yield)

    given = Given()
    made = simulate(steps=0, **{**RUN, "rounds": 1}, **given.names({"wrap": [Odd]}), vmap="on")
    seen = groups(made)
    run_round(made.state, 1, made.engine)
    assert seen == []
    assert [row["loss"] for row in made.state.client_rows] == [0.0] * RUN["clients"]
    assert "alarms" not in made.state.rows[-1]


@pytest.mark.parametrize(("values", "why"), [
    ({"extract": "fiarse", "aggregate": "overlap"}, "extract plugin 'fiarse' takes part in local training"),
    ({"extract": "full", "aggregate": "overlap", "dataset": "digits", "model": "lstm"}, "draws random numbers, is recurrent"),
])  # fmt: skip
def test_who_cannot_train_in_vmap_groups_is_told_why(simulate, values, why):
    made = simulate(steps=0, vmap="on", **({"model_args": {}, "levels": "1"} if "model" in values else {}), **values)
    assert made.group_size == 1
    assert any(why in note for note in made.server.notes)


def test_auto_is_a_rule_on_device_parameters_and_batch():
    small, large, conv = SMALL_NETS["mlp"](), ZOO["mlp"](classes=10, channels=1, size=28), SMALL_NETS["fedconv-cnn"]()
    auto = resolve({})
    assert vectorized.group_size(small, auto, (1, 6, 6), False) == vectorized.MOST
    assert vectorized.group_size(small, auto, (1, 6, 6), True) == 1
    assert vectorized.group_size(large, auto, (1, 28, 28), False) == 1
    assert vectorized.group_size(conv, auto, (1, 6, 6), False) > 1
    assert vectorized.group_size(conv, resolve({"batch_size": 512}), (1, 28, 28), False) == 1
    plain, ten = ZOO["preresnet18"](classes=10, channels=3, widths=[8, 16, 32, 64]), resolve({"batch_size": 10})
    assert vectorized.group_size(plain, ten, (3, 32, 32), False) > 1
    assert vectorized.group_size(plain, auto, (3, 32, 32), False) == 1
    assert vectorized.group_size(ZOO["preresnet18"](classes=10, channels=3), ten, (3, 32, 32), False) == 1
    assert vectorized.group_size(large, resolve({"vmap": "on"}), (1, 28, 28), False) > 1
    assert vectorized.group_size(small, resolve({"vmap": "off"}), (1, 6, 6), False) == 1
