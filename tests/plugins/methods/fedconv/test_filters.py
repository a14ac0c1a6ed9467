"""FedConv's filters: compression, dilation, and their gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.elastic import NAMES, STATE, WIDTHS, ratios
from helpers.oracles import quick
from hetfl.models.state import tensors
from hetfl.models.zoo import FedConvCNN
from hetfl.plugins.methods.fedconv import fast
from hetfl.plugins.methods.fedconv.compression import Compressor, plain_form
from hetfl.plugins.methods.fedconv.dilation import dilate, dilate_coverage
from hetfl.plugins.methods.fedconv.filters import Filters, mlr, residual_of
from hetfl.plugins.methods.fedconv.tiling import Block, Part, split_axis, tile_parameters, tile_tensor, to_images
from hetfl.submodel.plan import Selection, grow
from hetfl.submodel.tracing.groups import trace
from hetfl.submodel.widths import Axis, prefix


def one_filter(v, small, large, p=0.0, q=0.0):
    block = Block("w", Part(torch.arange(large[0]), small[0]), Part(torch.arange(large[1]), small[1]), 1)
    v = torch.tensor(v)[None]
    weights = [[torch.tensor([p]), torch.tensor([q]), v.flatten(1).norm(dim=1), v]]
    return Filters(Selection(WIDTHS, WIDTHS.select(prefix(1))), [block], weights)


@pytest.mark.parametrize(
    ("ratio", "sizes"),
    [(0.75, {16: (12, 5), 32: (24, 9), 1568: (1176, 393)}), (0.5625, {16: (9, 8), 32: (18, 15), 1568: (882, 687)})],
)
def test_sizes_and_kernels(ratio, sizes):
    """spec fedconv 6.1: (n, r) -> (m, k) by the filters of the MNIST net; what is compressed to m is dilated to n again"""
    model = FedConvCNN(10, 1, 28)
    state, widths = tensors(model), trace(model, torch.randn(2, 1, 28, 28))
    selection = Selection(widths, widths.select(prefix(ratio)))
    filters = Filters(selection, tile_parameters(selection, state, [name for name, _ in model.named_parameters()]))
    found = {}
    for block in filters.blocks:
        found |= {n: (m, k) for n, m, k in zip(block.large, block.small, block.kernel, strict=True) if n in sizes}
    assert found == sizes
    filters.randomise(torch.Generator().manual_seed(0))
    small = Compressor(filters, state)()
    grown = dilate(filters, small, state)
    for block in filters.blocks:
        assert to_images(small[block.name], *(torch.arange(m) for m in block.small)).shape == (block.taps, *block.small)
        assert to_images(grown[block.name], *(torch.arange(n) for n in block.large)).shape == (block.taps, *block.large)


def test_the_residual_is_that_of_convolutions():
    """spec fedconv 2.3: every convolution keeps the image beside its projection, one of 1x1 too; a linear layer does not"""
    for w, kept in ((torch.ones(2, 4, 1, 1), 1.0), (torch.ones(2, 4, 3, 3), 1.0), (torch.ones(2, 4), 0.0), (torch.ones(2), 0.0)):
        (block,) = tile_tensor(Selection(WIDTHS, WIDTHS.select(prefix(1))), "w", w)
        assert (residual_of(block, "conv"), residual_of(block, "all")) == (kept, 1.0)


def test_compress_and_dilate_oracles():
    """spec fedconv 6.2, 6.3, 6.4"""
    assert torch.allclose(mlr(torch.tensor([-2.0, -1, 0, 1, 2])), torch.tensor([-0.002, -0.001, 0, 0.85, 1.7]))
    assert torch.allclose(mlr(torch.tensor([-2.0, 1]), 2), torch.tensor([-2e-6, 0.7225]))
    filters = one_filter([[0.25, 0.25], [0.25, 0.25]], (3, 3), (4, 4))
    w = {"w": torch.arange(16.0).reshape(4, 4)}
    expected = torch.tensor([[2.5, 3.5, 4.5], [6.5, 7.5, 8.5], [10.5, 11.5, 12.5]])
    assert torch.allclose(Compressor(filters, w).pieces()[0][0], expected)
    assert torch.allclose(Compressor(filters, w, times=1).pieces()[0][0], 0.85 * expected)
    grown = dilate(one_filter([[1.0] * 3] * 3, (2, 2), (4, 4)), {"w": torch.tensor([[1.0, 2], [3, 4]])}, w)["w"]
    assert torch.allclose(grown, torch.tensor([[1.0, 3, 3, 2], [4, 10, 10, 6], [4, 10, 10, 6], [3, 7, 7, 4]]))


@quick
@given(ratios, st.integers(0, 5))
def test_compress_then_dilate_keeps_shapes_for_any_ratio(ratio, seed):
    """spec fedconv 6, properties; both random and delta filters"""
    selection = Selection(WIDTHS, WIDTHS.select(prefix(ratio)))
    filters = Filters(selection, tile_parameters(selection, STATE, NAMES))
    plain = selection.take(STATE)
    filters.active = True
    small = Compressor(filters, STATE)()
    assert all(torch.allclose(small[n], plain[n], atol=1e-5) for n in NAMES)
    filters.randomise(torch.Generator().manual_seed(seed))
    small = Compressor(filters, STATE)()
    assert {n: t.shape for n, t in small.items()} == {n: t.shape for n, t in plain.items()}
    large = dilate(filters, small, STATE)
    assert {n: t.shape for n, t in large.items()} == {n: STATE[n].shape for n in NAMES}
    assert all((t >= 0).all() for t in dilate_coverage(filters, STATE).values())


@quick
@given(ratios)
def test_delta_filters_dilate_to_placement(ratio):
    selection = Selection(WIDTHS, WIDTHS.select(prefix(ratio)))
    filters, small = Filters(selection, tile_parameters(selection, STATE, NAMES)), selection.take(STATE)
    zero = {n: torch.zeros_like(t) for n, t in STATE.items()}
    placed, covered = grow(selection.put(small), zero)
    for n in NAMES:
        assert torch.allclose(dilate(filters, small, STATE)[n], placed[n], atol=1e-5)
        assert torch.allclose(dilate_coverage(filters, STATE)[n], covered[n], atol=1e-5)


@pytest.mark.parametrize("spectral", [True, False])
def test_dilation_is_the_adjoint_of_compression_in_both_forms(spectral):
    """spec fedconv 6, properties: <K * W, S> = <W, K^T S>"""
    selection = Selection(WIDTHS, WIDTHS.select(prefix(0.5)))
    filters = Filters(selection, tile_parameters(selection, STATE, NAMES))
    filters.randomise(torch.Generator().manual_seed(1))
    for block, weights in zip(filters.blocks, filters.weights, strict=True):
        block.__dict__["spectral"] = spectral
        weights[0].zero_(), weights[1].zero_()
    small = Compressor(filters, STATE)()
    probe = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(2)) for n, t in small.items()}
    back = dilate(filters, probe, STATE)
    for n in NAMES:
        assert torch.allclose((small[n] * probe[n]).sum(), (STATE[n] * back[n]).sum(), atol=1e-3, rtol=1e-3)


def test_tuning_reaches_every_filter_and_leaves_the_global_model(tmp_path):
    """spec fedconv 6, properties: finite non-zero gradients to p, q, g, V; G bitwise unchanged"""
    selection = Selection(WIDTHS, WIDTHS.select(prefix(0.5)))
    filters = Filters(selection, tile_parameters(selection, STATE, NAMES))
    filters.active = True
    before = {n: t.clone() for n, t in STATE.items()}
    filters.flat.requires_grad_()
    draw = torch.Generator().manual_seed(0)
    sum((t * torch.randn(t.shape, generator=draw)).sum() for n, t in Compressor(filters, STATE)().items() if n in NAMES).backward()
    assert torch.isfinite(filters.flat.grad).all()
    for block, (p, q, _, v) in zip(filters.blocks, filters.split(filters.flat.grad), strict=True):
        assert (p != 0).all()
        assert (q != 0).all()
        assert (v != 0).any() or block.kernel == (1, 1)
    assert all(torch.equal(STATE[n], before[n]) for n in STATE)


@pytest.mark.parametrize("few", [True, False], ids=["windows", "spectra"])
@pytest.mark.parametrize("kept", [(4, 5), (7, 5), (4, 6), (7, 6)], ids=["both cut", "columns cut", "rows cut", "whole"])
def test_filtering_is_its_formula_and_its_gradients_are_autograds(monkeypatch, kept, few):
    """The fused step against the method's own form (spec fedconv 2.3), by windows and by spectra."""
    monkeypatch.setattr(fast, "MOST_ENTRIES", 1 << 20 if few else 0)
    g = torch.Generator().manual_seed(0)
    block = Block("w", Part(torch.arange(7), kept[0]), Part(torch.arange(6), kept[1]), 3)
    x, shape = torch.randn(3, 7, 6, generator=g), (3, *block.kernel)
    weights = [torch.randn(*s, generator=g).requires_grad_() for s in ((3,), (3,), (3,), shape)]

    bundle, keep = fast.Bundle([0], [shape]), torch.ones(3)
    ours, theirs = (
        fast.compress_bundle(*weights[:3], weights[3].flatten(), keep, bundle, [fast.Correlation(block, x)])[0],
        plain_form([block], [x], [1.0])([weights])[0],
    )
    assert torch.allclose(ours, theirs, atol=1e-5)
    direction = torch.randn(ours.shape, generator=g)
    for a, b in zip(torch.autograd.grad(ours, weights, direction), torch.autograd.grad(theirs, weights, direction), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_an_axis_is_filtered_by_runs_of_one_group_and_sliced_where_there_are_too_many():
    """spec fedconv 2.2: kernels do not reach over the border of two groups, be it where no unit number falls"""

    def parts(group, unit, index):
        axis = Axis(("a", "b"), torch.tensor(group), torch.tensor(unit))
        return [(part.positions.tolist(), part.kept) for part in split_axis(axis, torch.tensor(index), len(group))]

    assert parts([0, 1, 1], [0, 0, 1], [0, 1]) == [([0], 1), ([1, 2], 1)]
    assert parts([0, 0, 0, 0], [0, 1, 0, 1], [0, 2]) == [([0, 1], 1), ([2, 3], 1)]
    assert parts([0, 0] * 65, [0, 1] * 65, [0, 2, 4]) == [([0, 2, 4], 3)]
