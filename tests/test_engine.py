"""The default engine: who begins when, who trains as one, sums as replies come; none of it changes a result."""

from __future__ import annotations

import threading
import weakref
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hetfl.aggregation.mean import MeanAggregator, gather
from hetfl.aggregation.updates import Update, Updates
from hetfl.config import resolve
from hetfl.data.dataset import Examples
from hetfl.engines.local import by_request, node
from hetfl.errors import UsageError
from hetfl.hooks.manager import PluginManager
from hetfl.models.state import copy_state, load_state, tensors
from hetfl.models.zoo import ZOO
from hetfl.parallel import AHEAD, Pool
from hetfl.rng import stream
from hetfl.rounds import evaluation as exams
from hetfl.runs import summary
from hetfl.runs.folder import RunFolder
from hetfl.submodel.blocks import Index
from hetfl.submodel.builder import to_fast_layout
from hetfl.submodel.plan import Patch
from hetfl.training import evaluation, local, vectorized
from hetfl.training.vectorized import Member

quick = settings(deadline=None, max_examples=25)


@quick
@given(st.lists(st.floats(0, 9), max_size=60), st.integers(1, 3))
def test_a_stream_keeps_the_order_begins_with_the_dearest_and_never_runs_far_ahead(costs, workers):
    pool, begun, lock, taken, far = Pool(workers), [], threading.Lock(), 0, []

    def job(item):
        with lock:
            begun.append(item)
            far.append(len(begun) - taken)
        return item

    items = list(enumerate(costs))
    found = []
    for item in pool.imap_ordered(job, items, lambda item: item[1]):
        found.append(item)
        with lock:
            taken += 1
    pool.close()
    assert found == items
    assert max(far, default=0) <= AHEAD * workers + 1
    if items and workers == 1:
        assert begun[0][1] == max(cost for _, cost in items[:AHEAD])


def test_a_stream_raises_what_a_job_raised():
    pool = Pool(2)
    with pytest.raises(ZeroDivisionError):
        list(pool.imap_ordered(lambda x: 1 / x, [1, 0, 2], lambda x: 1.0))
    pool.close()


@quick
@given(st.permutations(range(6)), st.sets(st.integers(0, 5)), st.integers(0, 5))
def test_replies_are_taken_in_client_order_whatever_the_arrival(arrival, silent, twice):
    sent = [SimpleNamespace(metadata=SimpleNamespace(message_id=f"m{i}", dst_node_id=node(i))) for i in range(6)]
    replies = [SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=f"m{i}")) for i in arrival if i not in silent]
    replies += [r for r in replies if r.metadata.reply_to_message_id == f"m{twice}"]
    replies.insert(twice, SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id="of an earlier round")))
    assert [client for client, _ in by_request(sent, iter(replies))] == [i for i in range(6) if i not in silent]


@quick
@given(st.data())
def test_a_block_is_added_to_where_its_index_says(data):
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    index = {}
    for dim in data.draw(st.sets(st.integers(0, len(shape) - 1))):
        units = data.draw(st.permutations(range(shape[dim])))
        index[dim] = torch.tensor(units[: data.draw(st.integers(1, shape[dim]))])
    total = torch.randn(shape)
    wanted = total.clone()
    values = torch.randn([len(index[d]) if d in index else n for d, n in enumerate(shape)])
    cells = torch.meshgrid(*(index.get(d, torch.arange(n)) for d, n in enumerate(shape)), indexing="ij")
    wanted[cells] += 0.5 * values
    block = Index(index)
    block.add(total, values, 0.5)
    assert torch.allclose(total, wanted)
    wanted[cells] += 2.0
    block.add(total, 1.0, 2.0)
    assert torch.allclose(total, wanted)


FOLDS = [("overlap", {}), ("overlap", {"weighting": "samples"}), ("fedavg", {}), ("fiarse", {"rate": 0.5})]


@pytest.mark.parametrize(("name", "options"), FOLDS)
def test_taking_updates_one_by_one_is_taking_them_together(name, options):
    from hetfl import registry

    roles = PluginManager({f"aggregate.{name}": registry.find("aggregate", name).load()(**options)})
    old = {"w": torch.randn(6, 4), "seen": torch.tensor(2)}
    rows = [torch.tensor([0, 1, 2]), torch.tensor([5, 1]), torch.arange(6)]
    updates = [
        Update(i, {"w": Patch(torch.randn(len(at), 4), {0: at}), "seen": Patch(torch.tensor(3 + i))}, 10.0 + i)
        for i, at in enumerate(rows)
    ]
    server = SimpleNamespace(state=old, clients={})
    fold = roles.stream(server, 1)
    one_by_one = gather(fold, updates).state
    together = roles.aggregate(server, Updates(updates[::-1], old), 1).state
    assert torch.equal(one_by_one["w"], together["w"])
    assert one_by_one["seen"] == together["seen"] == 5
    assert not torch.equal(one_by_one["w"], old["w"])


def test_a_running_aggregation_holds_no_reply(simulate, monkeypatch):
    """While a client's update is added, those before it are gone."""
    alive, seen, whole = [], weakref.WeakSet(), MeanAggregator.add

    def add(self, update):
        seen.add(update)
        alive.append(len(seen))
        whole(self, update)

    monkeypatch.setattr(MeanAggregator, "add", add)
    simulate(extract="heterofl", aggregate="overlap", clients=12, levels="1", steps=1, pretrain_steps=0)
    assert len(alive) == 12
    assert max(alive) <= 2


def alone(model, member, options):
    """One client's training by itself, as train.fit does it."""
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


NETS = {
    "mlp": lambda: ZOO["mlp"](classes=3, channels=1, size=6, hidden=(5,)),
    "fedconv-cnn": lambda: ZOO["fedconv-cnn"](classes=3, channels=1, size=6, widths=(3, 4)),
    "cnn": lambda: ZOO["cnn"](classes=3, channels=1, widths=(3, 4)),
}


@pytest.mark.parametrize("fixed", [False, True])  # in fixed places: what a GPU records
@pytest.mark.parametrize("net", NETS)
@settings(deadline=None, max_examples=5)
@given(
    counts=st.lists(st.integers(2, 23), min_size=2, max_size=4), epochs=st.integers(1, 3), batch=st.integers(2, 9),
    momentum=st.sampled_from([0.0, 0.9]), clip=st.sampled_from([0.0, 0.3]), optimizer=st.sampled_from(["sgd", "adam"]),
)  # fmt: skip
def test_a_vmap_group_trains_as_its_clients_would_alone(net, fixed, counts, epochs, batch, momentum, clip, optimizer):
    torch.manual_seed(0)
    model = to_fast_layout(NETS[net]().double())  # in single precision rounding may turn a ReLU or a maximum the other way
    if not vectorized.allows_padding(model):
        counts = counts[:1] * len(counts)
    x, y = torch.randn(40, 1, 6, 6).double(), torch.arange(40) % 3
    if net == "cnn":  # biases before a batch norm have no gradient but rounding, which Adam would blow up
        optimizer = "sgd"
    values = {"epochs": epochs, "batch_size": batch, "momentum": momentum, "clip": clip, "optimizer": optimizer, "lr": 0.01}
    options = resolve(values)
    state = {name: t.clone() for name, t in tensors(model).items()}
    members = [Member(i, state, Examples(x, y, torch.randperm(40)[:n].sort().values)) for i, n in enumerate(counts)]
    vectorized.train(model, members[::-1], options, 1, fixed)  # what another group leaves behind is to be gone
    together = vectorized.train(model, members, options, 1, fixed)
    for member, trained in zip(members, together, strict=True):
        wanted, loss = alone(model, member, options)
        assert trained.loss == pytest.approx(loss, rel=1e-3, abs=1e-4)
        for name, tensor in wanted.items():
            assert torch.allclose(trained.state[name].to(tensor), tensor, rtol=1e-4, atol=1e-5), name


def test_a_vmap_group_scores_as_its_clients_would_alone():
    torch.manual_seed(0)
    model = NETS["cnn"]()
    x, y = torch.randn(40, 1, 6, 6), torch.arange(40) % 3
    states = [{n: t + 0.1 * i if t.is_floating_point() else t for n, t in tensors(model).items()} for i in range(3)]
    data = [Examples(x, y, torch.arange(n)) for n in (1, 9, 40)]
    for state, own, score in zip(states, data, vectorized.evaluate(model, states, data, 8), strict=True):
        wanted = evaluation.evaluate(load_state(NETS["cnn"](), state), own, 8)
        assert score.examples == wanted.examples
        assert score.accuracy == pytest.approx(wanted.accuracy)
        assert score.loss == pytest.approx(wanted.loss, rel=1e-4)


RUN = {"extract": "heterofl", "aggregate": "overlap", "clients": 7, "partition": "dirichlet", "levels": "1:4,0.5:3", "rounds": 2}


def test_vmap_groups_change_a_run_by_rounding_alone_and_never_with_the_workers(simulate):
    off, on, other = (simulate(**RUN, vmap=c, workers=w) for c, w in (("off", 2), ("on", 1), ("on", 2)))
    assert (off.vmap_clients, on.vmap_clients > 1) == (1, True)
    for name, tensor in off.server.state.items():
        assert torch.allclose(on.server.state[name], tensor, rtol=1e-3, atol=1e-4)
        assert torch.equal(on.server.state[name], other.server.state[name])
    for a, b in zip(off.rounds.client_rows, on.rounds.client_rows, strict=True):
        assert set(a) == set(b)
        assert a["examples"] == b["examples"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(("values", "why"), [
    ({"extract": "fiarse", "aggregate": "overlap"}, "a plugin takes part in local training"),
    ({"extract": "full", "aggregate": "overlap", "dataset": "digits", "model": "lstm"}, "draws random numbers or is recurrent"),
])  # fmt: skip
def test_who_cannot_train_in_vmap_groups_is_told_why(simulate, values, why):
    made = simulate(steps=0, vmap="on", **({"model_args": {}, "levels": "1"} if "model" in values else {}), **values)
    assert made.vmap_clients == 1
    assert any(why in note for note in made.server.notes)


def test_auto_is_a_rule_on_device_parameters_and_batch():
    small, large, conv = NETS["mlp"](), ZOO["mlp"](classes=10, channels=1, size=28), NETS["fedconv-cnn"]()
    auto = resolve({})
    assert vectorized.group_size(small, auto, (1, 6, 6), False) == vectorized.MOST
    assert vectorized.group_size(small, auto, (1, 6, 6), True) == 1
    assert vectorized.group_size(large, auto, (1, 28, 28), False) == 1
    assert vectorized.group_size(conv, auto, (1, 6, 6), False) > 1
    assert vectorized.group_size(conv, resolve({"batch_size": 512}), (1, 28, 28), False) == 1
    assert vectorized.group_size(large, resolve({"vmap": "on"}), (1, 28, 28), False) > 1
    assert vectorized.group_size(small, resolve({"vmap": "off"}), (1, 6, 6), False) == 1


def test_rows_are_appended_until_a_column_is_new(tmp_path):
    folder, rows = RunFolder(tmp_path), [{"round": 1}]
    for more in ({"round": 2}, {"round": 3, "x": 0.5}, {"round": 4}):
        folder.table("t.csv", rows)
        rows.append(more)
    folder.table("t.csv", rows)
    assert (tmp_path / "t.csv").read_text() == "round,x\n1,\n2,\n3,0.5\n4,\n"


@pytest.mark.parametrize("vmap", ["off", "on"])
def test_bf16_trains_about_as_float32_does_and_keeps_float32_weights(simulate, vmap):
    values = {"extract": "heterofl", "aggregate": "overlap", "vmap": vmap, "pretrain_steps": 0}
    plain, short = (simulate(**values, precision=precision) for precision in ("float32", "bf16"))
    assert not all(torch.equal(t, short.server.state[n]) for n, t in plain.server.state.items())
    for name, tensor in plain.server.state.items():
        assert short.server.state[name].dtype == tensor.dtype
        assert torch.allclose(short.server.state[name], tensor, atol=0.05)


@pytest.mark.parametrize(("device", "said"), [
    ("gpu", "--device 'gpu' is no device; cpu, cuda or cuda:0 are"), ("meta", "--device meta is not supported; cpu and cuda are"),
    ("cuda:99", "--device cuda:99 cannot be used: this .* --device cpu can"),
])  # fmt: skip
def test_a_device_that_is_not_there_gets_one_sentence(simulate, device, said):
    with pytest.raises(UsageError, match=said):
        simulate(steps=0, extract="full", aggregate="overlap", device=device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("values", [{"extract": "fedconv", "aggregate": "kld"}, {"extract": "heterofl", "aggregate": "overlap"}])
def test_a_gpu_comes_to_about_the_same(simulate, values):
    here, there = (simulate(**values, device=device) for device in ("cpu", "cuda"))
    for name, tensor in here.server.state.items():
        assert torch.allclose(there.server.state[name], tensor, atol=0.05)


def test_each_model_is_tested_once_and_as_if_by_itself(simulate, monkeypatch):
    """A level that is the whole model, and what a client was sent and the round before tested, are not tested again."""
    seen, whole = [], evaluation.score_batches

    def score_batches(model, data, part):
        seen.append(sum(p.numel() for p in model.parameters()))
        return whole(model, data, part)

    monkeypatch.setattr(exams, "score_batches", score_batches)
    made = simulate(extract="heterofl", aggregate="overlap", levels="1,0.5,0.5", steps=1)
    pieces = -(-len(made.rounds.test) // (made.options.eval_batch_size * exams.PIECE))
    assert len(seen) == 4 * pieces  # in round 1: the new and the sent one of both levels
    seen.clear()
    made.rounds.step(2, made.grid)
    assert len(seen) == 2 * pieces
    first, second = made.rounds.rows
    assert second["sent-0.5@test"] == first["level-0.5@test"]
    assert second["level-1@test"] == second["global@test"]
    score = made.server.score(made.server.state, made.rounds.test)
    assert second["global@test"] == score.accuracy
    assert second["global@test loss"] == pytest.approx(score.loss)


def test_early_stopping_keeps_the_best_step_and_says_what_it_saved(simulate):
    made = simulate(
        extract="fedconv", aggregate="overlap", set={"fedconv": {"first_steps": 400, "lr": 0.5, "patience": 2}}, steps=1
    )
    steps, epochs = (sum(part) for part in zip(*made.server.saved, strict=True))
    assert steps > 0
    assert epochs > 0
    assert made.rounds.rows[0]["server steps saved"] == steps
    assert made.rounds.rows[0]["server steps"] == 400 - steps
    assert any(f"saved {steps} of" in note for note in summary.early_stopping_note(made))
    whole = simulate(
        extract="fedconv", aggregate="overlap", set={"fedconv": {"first_steps": 400, "lr": 0.5, "patience": 0}}, steps=1
    )
    assert whole.rounds.rows[0]["server steps"] == 400
    assert not summary.early_stopping_note(whole)
