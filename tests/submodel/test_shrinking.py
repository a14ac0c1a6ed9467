"""`hetfl.shrink` and `hetfl.width_groups` on modules of one's own: round trips, equal outputs, sentences for what cannot be."""

from __future__ import annotations

import doctest

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hetfl
from hetfl import UsageError, shrink, width_groups
from hetfl.models.convnets import CNN
from hetfl.models.sequences import Encoder
from hetfl.models.state import tensors
from hetfl.submodel import shrinking
from hetfl.submodel.tracing.twins import run_twins

quick = settings(deadline=None, max_examples=10)


class Tied(nn.Module):
    """The embedding scores the classes too; one buffer is an integer."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(9, 12), nn.Linear(12, 12), nn.Linear(12, 9, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("calls", torch.tensor(3))

    def forward(self, ids):
        return self.head(torch.relu(self.hidden(self.embed(ids).mean(1))))


MAKERS = {
    "cnn": lambda: (CNN(10, 1, (6, 8, 10)), torch.randn(2, 1, 12, 12)),
    "encoder": lambda: (Encoder(4, 30, 12, 16, 2, 4, dropout=0.0), torch.randint(1, 30, (2, 12))),
    "tied": lambda: (Tied(), torch.randint(0, 9, (2, 5))),
}


def made(name):
    """The model with random values for every floating-point tensor, in evaluation mode, and a batch."""
    torch.manual_seed(0)
    model, x = MAKERS[name]()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if key.endswith("var") else torch.randn_like(tensor) * 0.2)
    return model.eval(), x


NETS = {name: made(name) for name in MAKERS}


@pytest.mark.parametrize("name", NETS)
@quick
@given(ratio=st.floats(0.05, 1.0), seed=st.integers(0, 99))
def test_grow_puts_every_entry_back_where_shrink_took_it(name, ratio, seed):
    model, x = NETS[name]
    before = {n: t.clone() for n, t in model.state_dict().items()}
    small = shrink(model, x, ratio)
    draw = torch.Generator().manual_seed(seed)
    trained = {n: t + torch.rand(t.shape, generator=draw).to(t.dtype) + 1 for n, t in tensors(small.model).items()}
    state, coverage = small.grow(trained)
    shapes = {n: t.shape for n, t in before.items()}
    assert shapes == {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in coverage.items()}
    for n, tensor in trained.items():
        block = state[n]
        for dim, positions in small.index.get(n, {}).items():
            assert positions.tolist() == sorted(set(positions.tolist()))
            block = block.index_select(dim, positions)
        assert torch.equal(block, tensor)
        assert int(coverage[n].sum()) == tensor.numel()
        assert torch.equal(state[n][coverage[n] == 0], before[n][coverage[n] == 0])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    model.load_state_dict(state)
    model.load_state_dict(before)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.9])
def test_the_smaller_model_computes_what_the_full_one_does_with_zeros(name, ratio):
    model, x = NETS[name]
    small = shrink(model, x, ratio)
    state, coverage = small.grow()
    masked = {n: state[n] * coverage[n].to(state[n].dtype) for n in tensors(model)}
    (ours,), (theirs,) = run_twins(small.widths, small.model, model, masked, (x,), small.plan.kept)
    assert (ours - theirs).abs().max() <= 1e-5 * (1 + theirs.abs().max())
    assert ours.abs().max() > 0.01


def test_sizes_are_those_of_the_ratio_and_the_model_is_its_own():
    model, x = NETS["cnn"]
    small = shrink(model.train(), x, 0.5)
    model.eval()
    assert [m.out_channels for m in small.model.modules() if isinstance(m, nn.Conv2d)] == [3, 4, 5]
    assert small.model.training
    before = model.state_dict()["0.weight"].clone()
    small.model(x).sum().backward()
    torch.optim.SGD(small.model.parameters(), 0.1).step()
    assert torch.equal(model.state_dict()["0.weight"], before)
    assert not torch.equal(small.grow()[0]["0.weight"], before)
    assert all(p.grad is None for p in model.parameters())
    assert repr(small) == "<CNN shrunk from 1,388 to 411 parameters, 3 width groups>"


def test_neither_modes_nor_random_numbers_are_touched_and_one_example_will_do():
    model, x = MAKERS["cnn"]()
    model.eval()[1].train()
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    small = shrink(model, x[:1], 0.5).model
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == [m.training for m in small.modules()] == modes


def test_whole_heads():
    model, x = NETS["encoder"]
    assert shrink(model, x, 0.5, heads="whole").model.layers[0].attention.heads == 2
    assert shrink(model, x, 0.5).model.layers[0].attention.heads == 4


def test_groups_are_readable():
    groups = width_groups(*NETS["cnn"])
    assert repr(groups).splitlines() == [
        "3 width groups; 99.1% of the entries are in tensors that they cut",
        "  0: 6 units in 0.weight[0], 0.bias[0], 1.running_mean[0], 1.running_var[0], 1.weight[0], 1.bias[0] and 1 more",
        "  4: 8 units in 4.weight[0], 4.bias[0], 5.running_mean[0], 5.running_var[0], 5.weight[0], 5.bias[0] and 1 more",
        "  8: 10 units in 8.weight[0], 8.bias[0], 9.running_mean[0], 9.running_var[0], 9.weight[0], 9.bias[0] and 1 more",
        "not cut:",
        "  13.bias: the model's output",
    ]
    assert groups.members()["0"][-1] == "4.weight[1]"


@pytest.mark.parametrize("ratio", [0, -0.5, 1.01, float("nan"), "half", None])
def test_a_ratio_that_is_none_is_refused(ratio):
    with pytest.raises(UsageError, match=r"^the ratio must be a number above 0 and up to 1, not "):
        shrink(*NETS["cnn"], ratio)


@pytest.mark.parametrize(
    ("model", "example", "sentence"),
    [
        (NETS["cnn"][0], torch.randn(2, 3, 12, 12), r"^the model does not run on inputs of shape \(2, 3, 12, 12\): RuntimeError: "),
        (NETS["cnn"][0], torch.zeros(0, 1, 12, 12), r"^the example must be a tensor with a batch of one or more inputs"),
        (NETS["cnn"][0], "picture", r"^the example must be a tensor with a batch of one or more inputs"),
        (torch.relu, torch.randn(2, 3), r"^the model must be a torch.nn.Module, not builtin_function_or_method$"),
        (nn.Bilinear(3, 3, 3), torch.randn(2, 3), r"^the model's forward needs 2 inputs \(input1, input2\) but gets only"),
        (nn.Linear(3, 2), torch.randn(2, 3), r"^no width of the Linear can be cut \('bias': the model's output\)$"),
        (nn.Linear(3, 2, device="meta"), torch.randn(2, 3), r"^the model has tensors without values"),
    ],
)
def test_what_cannot_be_shrunk_gives_a_sentence(model, example, sentence):
    with pytest.raises(UsageError, match=sentence):
        shrink(model, example, 0.5)


def test_a_state_of_another_model_is_not_grown():
    model, x = NETS["cnn"]
    small = shrink(model, x, 0.5)
    with pytest.raises(
        UsageError, match=r"^tensor '0.weight' of the smaller model has the shape \(3, 1, 3, 3\), but the one given is of"
    ):
        small.grow(model.state_dict())
    with pytest.raises(UsageError, match=r"but the one given is not there$"):
        small.grow({})


def test_docstrings_are_right():
    assert doctest.testmod(shrinking).attempted > 3
    assert doctest.testmod(shrinking).failed == 0
    assert {"shrink", "width_groups", "Shrunk"} <= set(hetfl.__all__)
