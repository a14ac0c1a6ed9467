"""Task kinds: losses, scores and distances, each held against plain torch or numbers by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hetfl.config import DataOptions, resolve
from hetfl.data.dataset import Examples
from hetfl.data.kinds import CLASSIFY, IGNORED, KINDS, find_kind, next_tokens
from hetfl.data.targets import scale_targets
from hetfl.models.sequences import Decoder
from hetfl.models.state import tensors
from hetfl.training import stacking, vectorized
from hetfl.training.evaluation import evaluate


def test_the_option_knows_every_kind():
    literal, _ = get_args(DataOptions.model_fields["task"].annotation)
    assert list(get_args(literal)) == list(KINDS)
    assert all(find_kind(name).name == name for name in KINDS)


def test_classes_are_scored_by_accuracy_and_cross_entropy():
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 4), torch.randn(10, 3), torch.randint(4, (10,))
    found, out = evaluate(model, Examples(x, y, torch.arange(10)), 4), model(x)
    assert found.accuracy == pytest.approx((out.argmax(1) == y).double().mean().item())
    assert found.loss == pytest.approx(F.cross_entropy(out, y).item())
    assert found.examples == 10


def test_the_divergence_of_classes_is_kl_at_a_temperature():
    torch.manual_seed(0)
    own, teacher = torch.randn(5, 4), torch.randn(5, 4)
    p, q = (teacher / 3).softmax(1), (own / 3).softmax(1)
    assert torch.isclose(CLASSIFY.divergence(own, teacher, 3.0), (p * (p / q).log()).sum(1).mean())


X = torch.tensor([[1, 5, 3, 4, 0, 0], [1, 2, 6, 3, 5, 4], [1, 2, 0, 0, 0, 0]])


def test_next_tokens_leave_out_padding_and_prompts():
    assert next_tokens(X, X != 0).tolist() == [
        [5, 3, 4, IGNORED, IGNORED, IGNORED], [2, 6, 3, 5, 4, IGNORED], [2, *[IGNORED] * 5]
    ]  # fmt: skip
    masked = next_tokens(X, X != 0, torch.tensor([3, 2, 2]))
    assert masked.tolist() == [[IGNORED, IGNORED, 4, *[IGNORED] * 3], [IGNORED, 6, 3, 5, 4, IGNORED], [IGNORED] * 6]


def test_a_language_models_mean_is_over_tokens_and_not_over_examples():
    torch.manual_seed(0)
    model, y = Decoder(7, 7, 6, width=8, layers=1, heads=2), next_tokens(X, X != 0, torch.tensor([3, 2, 2]))
    kind, out = find_kind("lm"), model(X)
    chosen = [(n, t) for n, t in (y != IGNORED).nonzero().tolist()]
    plain = [F.cross_entropy(out[n, t][None], y[n, t][None]).item() for n, t in chosen]
    assert len(chosen) == 5
    assert kind.loss(out, y).item() == pytest.approx(sum(plain) / 5)
    found = evaluate(model, Examples(X, y, torch.arange(3), kind), 2)
    assert found.loss == pytest.approx(sum(plain) / 5)
    assert found.accuracy == pytest.approx(sum(int(out[n, t].argmax() == y[n, t]) for n, t in chosen) / 5)
    assert kind.find_detail(found.loss) == pytest.approx(math.exp(sum(plain) / 5))
    nothing = torch.full_like(y, IGNORED)
    assert kind.loss(out, nothing).item() == 0.0, "a batch of prompts alone must not be a division by zero"


def test_numbers_are_scored_by_the_variance_that_is_explained():
    kind, y = find_kind("regress"), torch.tensor([[1.0, -1.0], [3.0, 1.0]])
    mean, std = kind.find_scale(y)
    assert (mean, std) == ((2.0, 0.0), (1.0, 1.0))
    out = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    assert kind.loss(out, y).item() == 0.25
    right, of, _ = kind.grade(out, y)
    assert (right.tolist(), of.tolist()) == ([0.5, 1.0], [1.0, 1.0])
    assert (kind.detail, kind.find_detail(0.25)) == ("RMSE", 0.5)
    assert kind.divergence(out, y, 3.0).item() == 0.25


def test_numbers_far_from_0_are_normalised_by_their_own_mean():
    y = torch.stack([torch.arange(100.0) / 100 + 12345.678, torch.full((100,), 0.1234567)], 1)
    z = scale_targets(y, *find_kind("regress").find_scale(y))
    assert z.mean(0).abs().max() < 0.01
    assert z[:, 0].std(correction=0) == pytest.approx(1.0, abs=0.01)


def test_labels_are_scored_by_micro_f1():
    kind, y = find_kind("multilabel"), torch.tensor([[1.0, 0, 1], [0, 0, 0], [1, 1, 0]])
    out = torch.tensor([[2.0, 2, -1], [-1, -1, -1], [3, 3, -3]])
    right, of, _ = kind.grade(out, y)  # true positives 3, answered 4, set 4
    assert right.sum() / of.sum() == 2 * 3 / (4 + 4)
    assert kind.loss(out, y).item() == pytest.approx(F.binary_cross_entropy_with_logits(out, y).item())
    p, q = (torch.tensor(z).sigmoid().item() for z in (0.5, -1.0))
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert kind.divergence(torch.tensor([[-2.0]]), torch.tensor([[1.0]]), 2.0).item() == pytest.approx(kl)
    names, groups = kind.group(y, ["a", "b", "c"])
    assert [names[g] for g in groups.tolist()] == ["a", "none", "a"]


def test_tenths_of_numbers_are_equally_many():
    names, groups = find_kind("regress").group(torch.randperm(100).float()[:, None], ())
    assert groups.bincount(minlength=len(names)).tolist() == [10] * 10


@pytest.mark.parametrize("name", KINDS)
def test_a_group_of_clients_trains_and_is_tested_as_each_alone(name):
    """vmap against a loop over clients of unequal sizes, of any kind."""
    torch.manual_seed(0)
    kind, count = find_kind(name), 11
    if kind.tokens:
        x = torch.randint(1, 7, (count, 6))
        y = next_tokens(x, torch.arange(6) < torch.randint(2, 7, (count, 1)))
        model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7))
    else:
        x, y, model = torch.randn(count, 3), kind.make_targets((3,), 4, count), nn.Linear(3, 4)
    options, state = resolve({"batch_size": 4, "epochs": 2, "clip": 0.1}), tensors(model)
    members = [vectorized.Member(i, state, Examples(x, y, torch.arange(n), kind)) for i, n in enumerate((3, 11))]
    together = vectorized.train(model, members, options, 1)
    for member, found in zip(members, together, strict=True):
        (alone,) = vectorized.train(model, [member], options, 1)
        assert found.loss == pytest.approx(alone.loss, rel=1e-5)
        assert all(torch.allclose(t, alone.state[n], atol=1e-6) for n, t in found.state.items())
    data = [m.train for m in members]
    for own, score in zip(data, stacking.evaluate(model, [state, state], data, 4), strict=True):
        wanted = evaluate(model, own, 4)
        assert (score.accuracy, score.loss) == pytest.approx((wanted.accuracy, wanted.loss), rel=1e-5)
        assert score.examples == wanted.examples
