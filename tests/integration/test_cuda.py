"""What runs on a GPU comes to what runs on a CPU, and to the same bits every time; skipped where torch finds no CUDA device.

Tolerance. Both devices compute in float32 (TF32 is off here), but sum in other orders: every sum differs by some 1e-7 of its terms,
and the few dozen steps of these runs let that grow. So what is compared is the distance of the two global models over the distance
that the model has gone since it was drawn (the norm over all tensors): CLOSE = 1e-4 is three digits above float32's step; 3e-6 was
the most on an H100. A ReLU or a maximum on the other side of a tie moves single entries by more, hardly the norm.

Adam divides a gradient by its own size: where that is rounding and nothing else, rounding makes whole steps. So FedConv's filters,
which the server trains, are allowed 3e-2 (9.3e-3 on an H100; the global model 9e-7), and models with batch norm are not pre-trained
here: the bias before a norm has no gradient but rounding, and moved by 6e-3 (by 8e-3 between oneDNN and torch's own convolutions on
one CPU).
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.runs import FOUR_CLIENTS, TINY, ready, tuned
from helpers.states import same
from hetfl import registry
from hetfl.aggregation.mean import WeightedSum
from hetfl.config import resolve
from hetfl.training.cuda_graphs import GraphedSteps
from hetfl.training.dropout import seeded_random

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")

CLOSE = 1e-4

PAIRS = [(e.name, e.aggregate) for e in registry.builtins() if e.role == "extract" and e.any_model]

PAIRS += [("heterofl", e.name) for e in registry.builtins() if e.role == "aggregate" and e.any_model and e.name != "overlap"]

CONV = {"model": "fedconv-cnn", "model_args": {"widths": [4, 8]}}

NORMED = {"model": "cnn", "model_args": {"widths": [8, 8]}}

GROUPED = {
    "extract": "heterofl",
    "aggregate": "overlap",
    "vmap": "on",
    "partition": "dirichlet",
    "clients": 6,
    "levels": "1:3,0.5:3",
    "batch_size": 4,
    "epochs": 4,
}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """No TF32, here and in other processes: convolutions have it by default, with 10 bits in place of 23."""
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    kinds = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [kind.allow_tf32 for kind in kinds]
    for kind in kinds:
        kind.allow_tf32 = False
    yield
    for kind, value in zip(kinds, before, strict=True):
        kind.allow_tf32 = value


def ran(device, steps=2, **values):
    """A run of `steps` rounds in which no client failed."""
    made = ready(steps, **{"device": device, "workers": 2, "pretrain_steps": 20, "server_data": 0.2, **values})
    assert all("fault" not in row for row in made.state.client_rows), [row.get("traceback") for row in made.state.client_rows]
    return made


def norm(a, b):
    """|a - b| over the floating-point tensors of b."""
    return torch.stack([(a[n] - b[n]).double().norm() for n in b if b[n].is_floating_point()]).norm()


def distance(a, b, begin):
    """|a - b| over |a - begin|."""
    return float(norm(a, b) / norm(a, begin).clamp(min=1e-12))


def kept_beside(made):
    """What the run keeps beside the global model: branches, what plugins keep, and what clients keep."""
    found = {f"{name}/{n}": patch.values for name, patches in made.server.branches.items() for n, patch in patches.items()}
    found |= {f"{key}/{n}": t for key, plugin in made.plugins.plugins.items() for n, t in plugin.state_dict().items()}
    for client, states in made.engine.client_states().items():
        found |= {f"{client}/{what}/{n}": t for what, state in states.items() for n, t in state.items()}
    assert all(t.device.type == "cpu" for t in found.values())
    return found


def compared(**values):
    """How far a GPU's global model, and all else that the run keeps, are from the CPU's."""
    here, there = ran("cpu", **values), ran("cuda", **values)
    assert here.server.state.keys() == there.server.state.keys()
    assert all(t.device.type == "cpu" for t in there.server.state.values())
    kept, also = kept_beside(here), kept_beside(there)
    assert kept.keys() == also.keys()
    assert all(torch.equal(t, also[n]) for n, t in kept.items() if not t.is_floating_point())
    nothing = {n: torch.zeros_like(t) for n, t in kept.items()}
    beside = distance(kept, also, nothing) if any(t.is_floating_point() for t in kept.values()) else 0.0
    assert norm(here.server.state, here.initial) > 0, "the model has not moved"
    return distance(here.server.state, there.server.state, here.initial), beside


@pytest.mark.parametrize(("extract", "aggregate"), PAIRS)
@pytest.mark.parametrize("net", [{"model": TINY["model"], "model_args": TINY["model_args"]}, CONV], ids=["mlp", "conv"])
def test_every_strategy_comes_to_the_same_on_a_gpu(extract, aggregate, net, record_property):
    """Two rounds, for some strategies do in the second what they learned in the first."""
    far, beside = compared(**net, **tuned(extract, aggregate, 3))
    record_property(f"{extract} x {aggregate} ({net['model']})", f"{far} {beside}")
    assert far < CLOSE
    assert beside < (3e-2 if extract == "fedconv" else CLOSE)


@pytest.mark.parametrize("policy", ["aggregate", "static", "recalibrate", "local"])
def test_batch_norm_comes_to_the_same_on_a_gpu(policy):
    values = {"extract": "heterofl", "aggregate": "overlap", "norm_policy": policy, "pretrain_steps": 0, **NORMED}
    assert max(compared(**values)) < CLOSE


@pytest.mark.parametrize("wrap", [["clip"], ["dp"], ["quantize"]], ids=str)
def test_wrapped_training_comes_to_the_same_on_a_gpu(wrap):
    """A value that int8 rounds up on one device and down on the other is a step of 1/127 apart."""
    far, _ = compared(extract="heterofl", aggregate="overlap", wrap=wrap, **CONV)
    assert far < (3e-2 if wrap == ["quantize"] else CLOSE)


def pool_of(made):
    return made.engine._workers._runtime.graphs


@pytest.mark.parametrize("net", [CONV, NORMED], ids=["conv", "batch norm"])
@pytest.mark.parametrize("more", [{}, {"momentum": 0.9, "clip": 0.5}, {"optimizer": "adam"}, {"precision": "bf16"}], ids=str)
def test_vmap_groups_are_recorded_as_cuda_graphs_and_change_no_bit(monkeypatch, net, more):
    """What was recorded is what is computed without a recording, on the same fixed tensors."""
    if net is NORMED:
        more = {**more, "partition": "iid"}  # groups of equal numbers of examples
    recorded = ran("cuda", **{**GROUPED, **net, **more})
    monkeypatch.setattr(GraphedSteps, "_record", lambda self, graph: None)
    plain = ran("cuda", **{**GROUPED, **net, **more})
    assert pool_of(recorded).recorded >= 2
    assert pool_of(plain).recorded == 0
    assert same(recorded.server.state, plain.server.state)


@pytest.mark.parametrize("net", [CONV, NORMED], ids=["conv", "batch norm"])
def test_wrapped_groups_are_recorded_and_come_to_the_same(monkeypatch, net):
    """HeteroFL's own training: clients of unequal sizes and two classes, scaled and masked. With batch norm each is a group of its
    own; their last batches, which come once an epoch, are not recorded. Batch norm of four examples and fewer lets rounding grow:
    2.7e-3 between an H200 and a CPU."""
    values = {**GROUPED, **net, "wrap": ["scaler", "maskloss"], "pretrain_steps": 0, "momentum": 0.9, "limit": 200}
    recorded, many = ran("cuda", 3, **values), ran("cuda", 3, **{**values, "workers": 8})
    monkeypatch.setattr(GraphedSteps, "_record", lambda self, graph: None)
    plain, here = ran("cuda", 3, **values), ran("cpu", 3, **values)
    assert pool_of(recorded).recorded >= 6
    assert pool_of(plain).recorded == 0
    assert same(recorded.server.state, plain.server.state)
    assert same(recorded.server.state, many.server.state)
    assert distance(recorded.server.state, here.server.state, here.initial) < (3e-2 if net is NORMED else CLOSE)


def test_recorded_groups_come_to_what_clients_come_to_one_by_one():
    """On the GPU, and on the CPU."""
    together, alone = ran("cuda", **{**GROUPED, **CONV}), ran("cuda", **{**GROUPED, **CONV, "vmap": "off"})
    here = ran("cpu", **{**GROUPED, **CONV, "vmap": "off"})
    assert together.group_size > 1 == alone.group_size == here.group_size
    assert distance(together.server.state, alone.server.state, alone.initial) < CLOSE
    assert distance(together.server.state, here.server.state, here.initial) < CLOSE


def test_what_was_recorded_serves_every_later_round():
    one, three = ran("cuda", 1, **{**GROUPED, **CONV}), ran("cuda", 3, **{**GROUPED, **CONV})
    assert pool_of(one).recorded == pool_of(three).recorded > 0


@pytest.mark.parametrize("values", [
    {**GROUPED, **CONV}, {**GROUPED, **NORMED, "partition": "iid"}, {**GROUPED, **CONV, "vmap": "off"},
    {**tuned("fedconv", "kld", 3), **CONV}, {**tuned("fiarse", "fiarse", 3), **CONV}, {**GROUPED, **CONV, "precision": "bf16"},
], ids=["groups", "batch norm", "one by one", "fedconv", "fiarse", "bf16"])  # fmt: skip
def test_the_same_seed_gives_the_same_bits_on_a_gpu_for_any_number_of_workers(values):
    first, again, many = ran("cuda", **values), ran("cuda", **values), ran("cuda", **{**values, "workers": 8})
    assert same(first.server.state, again.server.state)
    assert same(first.server.state, many.server.state)


def test_sums_are_kept_on_the_gpu_where_a_round_fits(monkeypatch, record_property):
    seen, whole = set(), WeightedSum.mean

    def mean(self):
        seen.add(self.total.device.type)
        return whole(self)

    monkeypatch.setattr(WeightedSum, "mean", mean)
    there = ran("cuda", **{**GROUPED, **CONV})
    assert seen == {"cuda"}
    seen.clear()
    monkeypatch.setattr("hetfl.training.device.fits_on_device", lambda *_: False)
    here = ran("cuda", **{**GROUPED, **CONV})
    assert seen == {"cpu"}
    far = distance(here.server.state, there.server.state, here.initial)
    record_property("sums on the GPU, sums in main memory (fedconv-cnn)", f"{far} 0.0")
    assert far < 1e-5


def test_processes_come_to_what_threads_come_to_on_a_gpu(record_property):
    values = {**GROUPED, **CONV, "vmap": "off"}
    here, there = ran("cuda", **values), ran("cuda", **values, engine="processes")
    far = distance(here.server.state, there.server.state, here.initial)
    record_property("threads, processes (fedconv-cnn)", f"{far} 0.0")
    assert far < 1e-5


@pytest.mark.parametrize(
    "values", [{**GROUPED, **CONV}, {"extract": "hermes", "set": {"hermes": {"threshold": 0.0}}}], ids=["groups", "memory"]
)
def test_a_stopped_run_goes_on_to_the_same_bits_on_a_gpu(tmp_path, stops, values):
    options = {**FOUR_CLIENTS, "rounds": 3, "device": "cuda", **values}
    assert stops.changes_nothing(tmp_path, resolve(options), 1)


class Dropping(nn.Module):
    """Every kind of random op that a forward pass may have."""

    def __init__(self):
        super().__init__()
        self.heads = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)
        self.recurrent = nn.LSTM(8, 8, num_layers=2, dropout=0.3, batch_first=True)

    def forward(self, x):
        x = self.heads(x, x, x, key_padding_mask=x[..., 0] > 1.5)[0] + F.dropout(x, 0.4)
        x = self.recurrent(x)[0] + 0.1 * torch.randn_like(x) + 0.1 * torch.rand(x.shape, device=x.device)
        return x + F.scaled_dot_product_attention(x, x, x, dropout_p=0.2, is_causal=True) + torch.empty_like(x).normal_()


def test_dropout_draws_the_same_numbers_on_a_gpu():
    torch.manual_seed(0)
    model, x, out = Dropping(), torch.randn(3, 5, 8), []
    for device in ("cpu", "cuda"):
        with seeded_random(True, torch.Generator().manual_seed(1)):
            out.append(model.to(device)(x.to(device)).cpu())
    assert torch.allclose(*out, atol=1e-4)


@pytest.mark.parametrize(("model", "vmap"), [("resnet18", "on"), ("mobilenetv2", "on"), ("mobilenetv2", "off"), ("lstm", "auto")])
def test_larger_nets_train_on_a_gpu(model, vmap):
    made = ran("cuda", 1, extract="heterofl", aggregate="overlap", model=model, model_args={}, limit=100, vmap=vmap)
    assert all(bool(torch.isfinite(t).all()) for t in made.server.state.values())
