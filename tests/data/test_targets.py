"""Targets of every kind of task, as users give them: arrays in memory, npz, tables."""

from __future__ import annotations

import math

import datasets
import numpy
import pytest
import torch

from hetfl.config import resolve
from hetfl.data import loading
from hetfl.data.dialects import FOLLOWERS, make_dialects
from hetfl.data.kinds import IGNORED
from hetfl.errors import UsageError
from hetfl.runs.given import Given

IDS = torch.arange(1, 7).repeat(40, 1)

RAW = torch.linspace(0, 1, 40)

LABELS = torch.arange(80).view(40, 2) % 3 % 2

FEW = {"clients": 2, "partition": "iid", "server_data": 0}


def load(data=None, **options):
    held = Given()  # as long as it lasts, the data have a name
    return loading.load(resolve({**FEW, **held.names({} if data is None else {"dataset": data}), **options}))


@pytest.mark.parametrize(
    ("data", "kind", "outputs"),
    [
        ((torch.randn(40, 3), RAW), "regress", 1),
        ((torch.randn(40, 3), [float(v) for v in RAW]), "regress", 1),
        ((torch.randn(40, 3), torch.stack([RAW, RAW], 1)), "regress", 2),
        ((torch.randn(40, 3), LABELS), "multilabel", 2),
        ((torch.randn(40, 3).numpy(), LABELS.bool().numpy()), "multilabel", 2),
        ((IDS, IDS), "lm", 7),
        ((torch.randn(40, 3), torch.arange(40) % 4), "classify", 4),
        ((IDS, torch.arange(40) % 4), "classify", 4),
    ],
)
def test_what_is_learned_of_arrays_follows_from_their_shape_and_type(data, kind, outputs):
    found = load(data)
    assert (found.kind.name, found.inputs.classes) == (kind, outputs)
    assert found.preprocessing["task"] == kind
    assert found.class_counts.sum() == sum(len(client.train) for client in found.clients)


def test_an_option_says_it_otherwise():
    found = load((torch.randn(40, 3), torch.arange(40)), task="regress")
    assert found.kind.name == "regress"
    y = torch.cat([client.train.all()[1] for client in found.clients] + [found.test.all()[1]])
    assert y.shape[1:] == (1,)
    assert y.abs().max() < 2, "targets are normalised"
    assert load((IDS, torch.arange(40)), task="lm").test.all()[1][0].tolist() == [2, 3, 4, 5, 6, IGNORED]


@pytest.mark.parametrize(
    ("data", "task", "said"),
    [
        ((torch.randn(40, 3), torch.arange(40)), "lm", "no token ids"),
        ((torch.randn(40, 3), torch.arange(40)), "multilabel", "0 or 1 for each label"),
        ((torch.randn(40, 3), ["a", "b"] * 20), "regress", "numbers are needed"),
        ((torch.randn(40, 3), RAW), "classify", "no class labels"),
        ((torch.randn(40, 3), RAW / 0), None, "finite"),
        ((IDS, IDS - 3), None, f"{IGNORED} where none is to be predicted"),
    ],
)
def test_targets_that_are_none_of_the_kind_are_refused_in_a_sentence(data, task, said):
    with pytest.raises(UsageError, match=said):
        load(data, task=task)


def test_a_folder_of_pictures_or_digits_has_classes_alone():
    with pytest.raises(UsageError, match="token ids"):
        load(dataset="digits", task="lm")
    assert load(dataset="digits", task="regress", limit=100).inputs.classes == 1


def test_arrays_of_files(tmp_path):
    x = numpy.random.default_rng(0).normal(size=(40, 3)).astype("float32")
    for name, arrays in {
        "regress": {"x": x, "y": RAW.numpy()}, "multilabel": {"x": x, "y": LABELS.numpy(), "classes": numpy.array(["a", "b"])},
        "lm": {"x": IDS.numpy(), "y": IDS.numpy()},
    }.items():  # fmt: skip
        (tmp_path / name).mkdir()
        numpy.savez(tmp_path / name / "train.npz", **arrays)
        assert load(dataset=str(tmp_path / name)).kind.name == name
    assert load(dataset=str(tmp_path / "multilabel")).classes == ("a", "b", "none")
    numpy.savez(tmp_path / "tokens.npz", x=IDS.numpy())
    assert load(dataset=str(tmp_path / "tokens.npz"), task="lm").test.all()[1][0].tolist() == [2, 3, 4, 5, 6, IGNORED]


def test_columns_of_tables():
    text = [f"word{i} and word{i % 3}" for i in range(40)]
    table = datasets.Dataset.from_dict
    assert load(table({"x": [[0.0, 1.0]] * 40, "target": RAW.tolist()})).kind.name == "regress"
    assert load(table({"x": [[0.0, 1.0]] * 40, "labels": LABELS.tolist()})).kind.name == "multilabel"
    plain = load(table({"text": text}), task="lm", tokens=5, vocab=50)
    assert (plain.inputs.classes, plain.inputs.vocab, plain.model) == (50, 50, "decoder")
    assert (plain.test.all()[1][:, 2] != IGNORED).all()
    prompted = load(table({"text": text, "prompt": ["say it"] * 40}), task="lm", tokens=6, vocab=50)
    x, y = prompted.test.all()
    assert (y[:, :2] == IGNORED).all(), "the prompt is not predicted"
    assert (y[:, 2:5] == x[:, 3:]).all()
    grouped = load(table({"text": text, "label": [i % 2 for i in range(40)]}), task="lm", tokens=5, vocab=50)
    assert grouped.classes == ("0", "1"), "classes, where there are some, are what a partition skews"
    given = load(table({"input_ids": IDS.tolist(), "labels": IDS.tolist()}), task="lm")
    assert (given.inputs.vocab, given.test.all()[1][0].tolist()) == (7, [1, 2, 3, 4, 5, 6])


def test_the_dialects_are_what_their_entropy_is_computed_of():
    """In each dialect a word has four followers, as often as FOLLOWERS says; padding and the first words are not predicted."""
    made = load(dataset="dialects")
    x, y = made.test.x, made.test.y
    assert (y[:, :4] == IGNORED).all()
    assert (y[:, 4:-1] == torch.where(x[:, 5:] == 0, IGNORED, x[:, 5:])).all()
    entropy = -sum(p * math.log(p) for p in FOLLOWERS)
    assert (round(entropy, 3), round(math.exp(entropy), 2)) == (1.063, 2.89)
    tensors, _ = make_dialects(resolve({}), print)
    follows = torch.zeros(4, 26, 26)
    first, second, dialect = tensors["x"][:, 1:-1], tensors["x"][:, 2:], tensors["groups"][:, None].expand(-1, 30)
    at = [t[second > 1] for t in (dialect, first, second)]
    follows.index_put_(at, torch.ones(len(at[0])), accumulate=True)
    assert ((follows > 0).sum(-1) <= 4).all()
    often = follows.sort(-1, descending=True).values.sum((0, 1))[:4]
    assert torch.allclose(often / often.sum(), torch.tensor(FOLLOWERS), atol=0.02)


def test_regress_is_normalised_by_what_is_given():
    found = load((torch.randn(40, 3), RAW), target_mean=(10.0,), target_std=(2.0,))
    assert found.test.all()[1].max() < -4
    with pytest.raises(UsageError, match="target-mean has 2 values"):
        load((torch.randn(40, 3), RAW), target_mean=(1.0, 2.0))


def test_regress_is_normalised_by_what_is_trained_on_alone():
    found = load((torch.randn(200, 3), torch.randn(200).exp()), server_data=20, own_test=0.3)
    trained = torch.cat([part.all()[1] for part in (*(c.train for c in found.clients), found.public.tune, found.public.holdout)])
    assert len(trained) < 130
    assert trained.mean().abs() < 1e-4
    assert trained.std(correction=0) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("targets", [torch.randn(40, 3), LABELS.repeat(1, 2)[:, :3]])
def test_train_and_test_have_as_many_targets(targets):
    x = torch.randn(40, 3)
    with pytest.raises(UsageError, match=r"train and test targets of .* differ in number: 1 and 3 an example"):
        load({"train": (x, targets), "test": (x, targets[:, :1])})
