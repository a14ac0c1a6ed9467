"""Plans, merges and filters: round trips and the numeric oracles of the specs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hetfl.aggregation.mean import mean, mean_with_absent
from hetfl.aggregation.updates import Update, Updates
from hetfl.config import resolve
from hetfl.models.state import tensors
from hetfl.models.zoo import MLP, FedConvCNN
from hetfl.plugins.methods.fedconv import fast
from hetfl.plugins.methods.fedconv.compression import Compressor, plain_form
from hetfl.plugins.methods.fedconv.dilation import correlate_transposed, dilate, dilate_coverage
from hetfl.plugins.methods.fedconv.filters import Filters, mlr
from hetfl.plugins.methods.fedconv.tiling import Block, Part, tile_parameters
from hetfl.rounds.reporting import NoCallback
from hetfl.runs.experiment import prepare
from hetfl.submodel.plan import Patch, Selection, grow, prefix, window
from hetfl.submodel.tracing.groups import trace

ratios = st.floats(0.05, 1.0)

quick = settings(deadline=None, max_examples=25)


def fixture():
    torch.manual_seed(0)
    model = FedConvCNN(10, 1, 8)
    return tensors(model), trace(model, torch.randn(2, 1, 8, 8)), model


STATE, WIDTHS, MODEL = fixture()

NAMES = [n for n, _ in MODEL.named_parameters()]


@quick
@given(ratios, st.integers(0, 70))
def test_put_of_take_is_identity_on_the_coverage(ratio, start):
    plan = Selection(WIDTHS, WIDTHS.select(window(ratio, start)))
    other = {n: t + 1 for n, t in STATE.items()}
    full, cover = grow(plan.put(plan.take(STATE)), other)
    for n, t in STATE.items():
        assert torch.equal(full[n], torch.where(cover[n] > 0, t, other[n]))
        assert int(cover[n].sum()) == plan.take(STATE)[n].numel()


def test_ratio_one_is_identity_and_round_zero_is_the_prefix():
    plan = Selection(WIDTHS, WIDTHS.select(prefix(1)))
    assert all(torch.equal(plan.take(STATE)[n], t) for n, t in STATE.items())
    for ratio in (0.25, 0.5, 0.8):
        a, b = (Selection(WIDTHS, WIDTHS.select(choose)).take(STATE) for choose in (prefix(ratio), window(ratio, 0)))
        assert all(torch.equal(a[n], b[n]) for n in STATE)


@quick
@given(ratios, ratios)
def test_narrower_windows_of_a_round_nest(a, b):
    small, large = sorted((a, b))
    assert set(window(small, 3)(16).tolist()) <= set(window(large, 3)(16).tolist())


def test_window_oracles():
    """spec fedrolex 6.1 and 6.2"""
    assert window(0.5, 0)(8).tolist() == [0, 1, 2, 3]
    assert window(0.5, 3)(8).tolist() == [3, 4, 5, 6]
    assert window(0.5, -3)(8).tolist() == [5, 6, 7, 0]
    assert window(0.5, 6)(8).tolist() == [6, 7, 0, 1]
    assert window(0.5, -6)(8).tolist() == [2, 3, 4, 5]
    assert window(0.6, 3)(5).tolist() == [3, 4, 0]
    seen = torch.stack([torch.bincount(window(0.25, j)(8), minlength=8) for j in range(8)])
    assert seen.sum(0).tolist() == [2] * 8
    assert seen[:3].sum(0).tolist() == [1, 2, 2, 1, 0, 0, 0, 0]


def test_window_of_an_mlp():
    """spec fedrolex 6.4"""
    model = MLP(2, 1, 2, hidden=(4, 8))
    widths = trace(model, torch.randn(2, 1, 2, 2))
    plan = Selection(widths, widths.select(window(0.5, 1)))
    state = tensors(model)
    small = plan.take(state)
    assert torch.equal(small["1.weight"], state["1.weight"][[1, 2]])
    assert torch.equal(small["3.weight"], state["3.weight"][[1, 2, 3, 4]][:, [1, 2]])
    assert small["5.weight"].shape == (2, 4)


def update(client, values, index=None, weight=1.0, coverage=None):
    where = {} if index is None else {0: torch.tensor(index)}
    return Update(client, {"v": Patch(torch.tensor(values, dtype=torch.float32), where, coverage)}, weight)


def merged(old, *updates, weights=None, merge=mean):
    ups = Updates(updates, {"v": torch.tensor(old, dtype=torch.float32)})
    return merge(ups, weights or [1.0] * len(ups))["v"].tolist()


def test_overlap_oracles():
    """spec heterofl 6.3, 6.4; fedrolex 6.3; baselines O1"""
    a, b, c = update(0, [4, 4, 4, 4]), update(1, [2, 2], [0, 1]), update(2, [0], [0])
    assert merged([9, 9, 9, 9], a, b, c) == [2, 3, 4, 4]
    assert merged([9, 9, 9, 9], b, c) == [1, 2, 9, 9]
    one = Patch(torch.ones(3)).rows(torch.tensor([True, True, False]))
    two = Patch(torch.full((3,), 3.0)).rows(torch.tensor([False, True, False]))
    assert merged([7, 7, 7], Update(0, {"v": one}, 1), Update(1, {"v": two}, 1)) == [1, 2, 7]
    rolled = update(0, [2, 3, 4, 1], [1, 2, 3, 0])
    assert merged([10] * 4, rolled, update(1, [5, 7], [1, 2])) == [1, 3.5, 5, 4]
    assert merged([10] * 4, update(1, [5, 7], [1, 2])) == [10, 5, 7, 10]
    pair = update(0, [1, 2], weight=10), update(1, [3, 6], weight=30)
    assert merged([0, 0], *pair, weights=[10, 30]) == [2.5, 5]
    assert merged([0, 0], *pair) == [2, 4]


def test_fedavg_lets_absentees_vote_for_the_old_value():
    a, b = update(0, [4, 4]), update(1, [2], [0])
    assert merged([8, 8], a, b, weights=[1, 3], merge=mean_with_absent) == [2.5, 7]


@quick
@given(st.lists(st.tuples(st.floats(0.1, 1), st.integers(1, 50), st.integers(0, 9)), min_size=1, max_size=5))
def test_means_do_not_depend_on_client_order_and_stay_inside(clients):
    old = {"v": torch.full((12,), 0.5)}
    ups = []
    for i, (ratio, n, start) in enumerate(clients):
        where = window(ratio, start)(12)
        ups.append(Update(i, {"v": Patch(torch.rand(len(where), generator=torch.Generator().manual_seed(i)), {0: where})}, n))
    for merge in (mean, mean_with_absent):
        forward, backward = Updates(ups, old), Updates(ups[::-1], old)
        a = merge(forward, forward.weights)["v"]
        assert torch.equal(a, merge(backward, backward.weights)["v"])
        assert ((a > -1e-6) & (a < 1 + 1e-6)).all()
    covered = torch.cat([u.patches["v"].index[0] for u in ups]).unique()
    outside = [i for i in range(12) if i not in covered.tolist()]
    assert torch.equal(mean(Updates(ups, old), [1.0] * len(ups))["v"][outside], old["v"][outside])


def test_integer_buffers_are_not_averaged():
    old = {"seen": torch.tensor(3)}
    ups = Updates([Update(i, {"seen": Patch(torch.tensor(n))}, 1.0) for i, n in enumerate((5, 8))], old)
    assert mean(ups, [1.0, 1.0])["seen"].item() == 8


def one_filter(v, small, large, p=0.0, q=0.0):
    block = Block("w", Part(torch.arange(large[0]), small[0]), Part(torch.arange(large[1]), small[1]), 1)
    v = torch.tensor(v)[None]
    weights = [[torch.tensor([p]), torch.tensor([q]), v.flatten(1).norm(dim=1), v]]
    return Filters(Selection(WIDTHS, WIDTHS.select(prefix(1))), [block], weights)


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


@pytest.mark.parametrize("few", [True, False])
def test_filtering_is_its_formula_and_its_gradients_are_autograds(monkeypatch, few):
    """The fused step against the method's own form (spec fedconv 2.3), by windows and by spectra."""
    monkeypatch.setattr(fast, "MOST_ENTRIES", 1 << 20 if few else 0)
    g = torch.Generator().manual_seed(0)
    block = Block("w", Part(torch.arange(7), 4), Part(torch.arange(6), 5), 3)
    x = torch.randn(3, 7, 6, generator=g)
    weights = [torch.randn(*s, generator=g).requires_grad_() for s in ((3,), (3,), (3,), (3, 4, 2))]

    bundle, keep = fast.Bundle([0], [(3, 4, 2)]), torch.ones(3)
    ours, theirs = (
        fast.compress_bundle(*weights[:3], weights[3].flatten(), keep, bundle, [fast.Correlation(block, x)])[0],
        plain_form([block], [x], [1.0])([weights])[0],
    )
    assert torch.allclose(ours, theirs, atol=1e-5)
    direction = torch.randn(ours.shape, generator=g)
    for a, b in zip(torch.autograd.grad(ours, weights, direction), torch.autograd.grad(theirs, weights, direction), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_transposed_correlation_by_spectra_is_the_direct_one():
    g = torch.Generator().manual_seed(0)
    x, k = (torch.randn(2, *s, generator=g).requires_grad_() for s in ((4, 5), (3, 2)))
    block = Block("w", Part(torch.arange(6), 4), Part(torch.arange(6), 5), 2)
    block.__dict__["spectral"] = True
    ours = correlate_transposed(x, k, block)
    theirs = F.conv_transpose2d(x[None], k[:, None], groups=2)[0]
    assert torch.allclose(ours, theirs, atol=1e-5)
    direction = torch.randn(ours.shape, generator=g)
    for a, b in zip(torch.autograd.grad(ours, (x, k), direction), torch.autograd.grad(theirs, (x, k), direction), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(("objective", "dilate"), [("distill", "update"), ("ce", "weights")])
def test_dilators_tuned_as_one_batch_are_those_tuned_alone(monkeypatch, objective, dilate):
    """Early stopping included: what one client's tuning comes to does not depend on who is beside it."""
    from hetfl.plugins.methods.fedconv import tuning as fedconv

    tuning = {"steps": 2, "first_steps": 2, "start": "random", "dilator_steps": 40, "patience": 1, "dilator_lr": 0.01}
    options = resolve({
        "dataset": "digits", "limit": 300, "clients": 4, "rounds": 1, "pretrain_steps": 5, "levels": "0.5:1", "control": False,
        "lr": 0.3, "aggregate": "overlap", "set": {"fedconv": {"objective": objective, "dilate": dilate, **tuning}},
    })  # fmt: skip
    found = []
    for most in (1, 16):
        monkeypatch.setattr(fedconv, "TOGETHER", most)
        made = prepare(options, NoCallback())
        made.rounds.start(made.grid)
        made.server.pool.close()
        found.append((made.server.state, sorted(made.server.saved)))
    (alone, spared), (together, spared_together) = found
    assert spared == spared_together
    assert objective != "ce" or len({steps for steps, _ in spared}) > 1
    x = made.federation.test.all()[0]
    said = [made.server.answers(state, x).log_softmax(1) for state in (alone, together)]  # a shift of all logits is free
    assert torch.allclose(*said, atol=1e-3)
