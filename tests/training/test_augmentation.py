"""Crops and flips of local training."""

from __future__ import annotations

import pytest
import torch

import hetfl
from hetfl import UsageError
from hetfl.config import resolve
from hetfl.data.catalog import KNOWN
from hetfl.data.dataset import Examples
from hetfl.models.state import tensors
from hetfl.models.zoo import ZOO
from hetfl.rng import stream
from hetfl.training import local, vectorized
from hetfl.training.augmentation import augment
from hetfl.training.vectorized import Member


def pictures(n=200, size=6):
    return torch.arange(n * 2 * size * size, dtype=torch.float32).view(n, 2, size, size) + 1


def test_every_picture_is_a_shift_or_a_mirrored_shift_of_itself():
    x, options = pictures(), resolve({"augment": ["crop", "flip"], "crop_padding": 2})
    out = augment(x, options, stream(0, "augment"))
    framed = torch.nn.functional.pad(x, (2,) * 4)
    seen = set()
    for before, after in zip(framed, out, strict=True):
        cuts = {(i, j): before[:, i : i + 6, j : j + 6] for i in range(5) for j in range(5)}
        either = {(*at, flip): cut.flip(2) if flip else cut for at, cut in cuts.items() for flip in (False, True)}
        found = [at for at, cut in either.items() if torch.equal(cut, after)]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) > 45  # of 50
    assert out.shape == x.shape


def test_what_is_left_empty_is_black():
    values = {"augment": ["crop"], "crop_padding": 6, "mean": [51.0, 102.0], "std": [51.0, 51.0]}
    x = torch.full((50, 2, 6, 6), 9.0)
    out = augment(x, resolve(values), stream(0, "augment"))
    assert set(out[:, 0].unique().tolist()) == {9.0, -1.0}
    assert set(out[:, 1].unique().tolist()) == {9.0, -2.0}


def test_flips_alone_move_nothing_and_none_is_none():
    x = pictures()
    out = augment(x, resolve({"augment": ["flip"]}), stream(0, "augment"))
    same = torch.tensor([torch.equal(a, b) for a, b in zip(x, out, strict=True)])
    assert torch.equal(out[~same], x[~same].flip(3))
    assert 70 < int(same.sum()) < 130
    assert augment(x, resolve({}), stream(0, "augment")) is x


@pytest.mark.parametrize("values", [{"augment": ["crop", "flip"], "crop_padding": 1}, {"local_steps": 7}, {"local_steps": 1}])
def test_a_vmap_group_trains_on_the_same_pictures(values):
    """As each client does alone."""
    torch.manual_seed(0)
    model = ZOO["fedconv-cnn"](classes=3, channels=2, size=6, widths=(3, 4)).double()
    x, y = torch.randn(40, 2, 6, 6).double(), torch.arange(40) % 3
    options, state = resolve({"batch_size": 4, "lr": 0.01, **values}), {n: t.clone() for n, t in tensors(model).items()}
    members = [Member(i, state, Examples(x, y, torch.arange(i, 40, 3)[: 5 + 4 * i])) for i in range(3)]
    together = vectorized.train(model, members, options, 2)
    plain = vectorized.train(model, members, resolve({"batch_size": 4, "lr": 0.01}), 2)
    for member, group, other in zip(members, together, plain, strict=True):
        single = vectorized.train(model, [member], options, 2)[0]
        by_hand = train_alone(model, member, options)
        for name, tensor in by_hand.items():
            assert torch.allclose(group.state[name], tensor, atol=1e-10)
            assert torch.allclose(single.state[name], tensor, atol=1e-10)
        assert any(not torch.allclose(by_hand[n], other.state[n], atol=1e-6) for n in by_hand)


def train_alone(model, member, options):
    """The client's tensors after local training by itself, as `local.fit` does it."""
    model.load_state_dict(member.state, strict=False)
    optimizer, draws = local.make_optimizer(model.train(), options, 2), stream(0, "augment", 2, member.client)
    for rows in local.batch_rows(member.train, options, stream(0, "batches", 2, member.client), model):
        optimizer.zero_grad()
        x = augment(member.train.x[rows], options, draws)
        torch.nn.functional.cross_entropy(model(x), member.train.y[rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        optimizer.step()
    return {n: t.clone() for n, t in tensors(model).items()}


def test_usual_is_that_of_the_data_set_and_vectors_are_refused():
    assert KNOWN["cifar10"].augment == ("crop", "flip")
    few = {"dataset": "digits", "limit": 60, "clients": 2, "rounds": 1, "pretrain_steps": 0, "control": False, "local_steps": 3}
    given = [{"augment": []}, {"augment": ["usual"]}, {"augment": ["crop"], "workers": 1}, {"augment": ["crop"], "workers": 2}]
    plain, usual, one, two = (hetfl.run(extract="heterofl", **few, **values).summary["weights sha256"] for values in given)
    assert plain == usual != one == two
    x, y = torch.randint(0, 9, (40, 7)).float(), torch.arange(40) % 2
    with pytest.raises(
        UsageError, match=r"augment flip is for pictures \(channels, height, width\); an input of '.*' has the shape"
    ):
        hetfl.run(extract="heterofl", augment=["flip"], data=(x, y), clients=2, rounds=1, pretrain_steps=0)
