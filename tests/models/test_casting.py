"""A frozen base that is held in bfloat16 computes, forwards and backwards, what its rounded values do in float32."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from hetfl.models.adapters import AdapterSpec, add_adapters
from hetfl.models.casting import is_low
from hetfl.models.frozen import freeze, frozen, round_base
from hetfl.models.sequences import Encoder
from hetfl.profiling.cost import LiveBytes, measure_step
from hetfl.submodel.builder import SubmodelBuilder
from hetfl.submodel.tracing.groups import trace


class Reader(nn.Module):
    """Its attention's weights are read by others than those that have them; one layer is used twice, and two share a weight."""

    def __init__(self):
        super().__init__()
        self.mix, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
        self.first, self.second, self.lstm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True)
        self.second.weight = self.first.weight
        self.start, self.head = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 4)

    def forward(self, x):
        x = x.view(len(x), -1, 8) + self.start
        x = self.norm(x + self.mix(x, x, x)[0])
        x = self.first(self.second(self.first(x)).relu())
        return self.head(self.lstm(x)[0].mean(1))


def conv():
    first = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(2)]
    return nn.Sequential(*first, nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 4))


def encoder():
    return Encoder(4, 50, 12, width=16, heads=2, dropout=0.0)


CASES = {
    "encoder": (encoder, lambda: torch.randint(2, 50, (5, 12)), "linear"),
    "conv": (conv, lambda: torch.randn(5, 3, 8, 8), "conv"),
    "reader": (Reader, lambda: torch.randn(5, 1, 8, 8), "first|second"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_its_rounded_values_do(case):
    make, draw, target = CASES[case]
    x, y = draw(), torch.arange(5) % 4
    torch.manual_seed(0)
    model = add_adapters(make(), AdapterSpec(4, 8.0, target), x, (4,))
    rounded, low = round_base(copy.deepcopy(model)), freeze(model, low=True)
    again = pickle.loads(pickle.dumps(low)) if case != "reader" else copy.deepcopy(low)
    assert is_low(low)
    assert {t.dtype for n, t in frozen(low).items() if "lstm" not in n} == {torch.bfloat16}
    for model in (rounded, low, again):
        model.train().zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
    for other in (low, again):
        assert torch.equal(other.eval()(x), rounded.eval()(x))
        grads = dict(other.named_parameters())
        assert all(torch.equal(p.grad, grads[n].grad) for n, p in rounded.named_parameters() if p.requires_grad)
    assert sum(p.grad is not None and bool(p.grad.any()) for p in low.parameters()) > 2


def test_neither_pass_keeps_a_float32_copy():
    x, y, peaks, side = torch.randn(2, 256), torch.zeros(2, dtype=torch.int64), [], 4 * 256 * 256
    for low in (False, True):
        net = nn.Sequential(*[nn.Linear(256, 256) for _ in range(12)], nn.Linear(256, 4))
        peaks.append(measure_step(freeze(add_adapters(net, AdapterSpec(2, 2.0), x, (4,)), low), x, y).peak)
    assert peaks[0] - peaks[1] > (12 / 2 - 2) * side


def test_an_embedding_casts_the_rows_alone():
    table = freeze(nn.Embedding(10_000, 8).requires_grad_(False), low=True)
    with LiveBytes([]) as alive:
        out = table(torch.tensor([4, 0]))
    assert torch.equal(out, table.weight[torch.tensor([4, 0])])
    assert alive.peak < 1000


def test_all_modules_of_a_run_have_the_same_low_base():
    net = encoder()
    ids = torch.randint(2, 50, (2, 12))
    widths = trace(add_adapters(net, AdapterSpec(4, 8.0), ids, (4,)), ids)
    builder = SubmodelBuilder(freeze(net, low=True), widths)
    whole, cut = builder.module(), builder.module({g.name: max(2, g.size // 2) for g in widths.groups})
    assert all(tensor is builder.base[name] for name, tensor in frozen(whole).items())
    assert is_low(cut)
    assert bool(torch.isfinite(cut.eval()(ids)).all())
