"""Data: nobody shares an example, the same options give the same bits, bad input ends in one clear sentence."""

from __future__ import annotations

import io
import shutil
import socket

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.data_files import KINDS, parts, refused, rows, write
from helpers.paths import ROOT
from hetfl.config import DataOptions
from hetfl.data.loading import fingerprint_split, load
from hetfl.data.partition import Split


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**40),
    clients=st.integers(1, 12),
    alpha=st.floats(1, 1e4),
    own=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    public=st.sampled_from([0.0, 0.05, 0.3, 2, 40]),
    held=st.floats(0.01, 0.99),
    limit=st.sampled_from([None, 120]),
)
def test_no_example_is_held_twice(numbered, kind, seed, clients, alpha, own, public, held, limit):
    options = DataOptions(
        dataset=str(numbered), partition=kind, partition_seed=seed, clients=clients, alpha=alpha, own_test=own,
        server_data=public, server_holdout=held, limit=limit,
    )  # fmt: skip
    federation = load(options)
    names = [x[:, 0] for x, _ in (part.all() for part in parts(federation))]
    assert len(torch.cat(names).unique()) == sum(map(len, names))
    total = (limit or 300) - sum(map(len, names[:-1]))  # pathological and shard may leave some to nobody
    assert total == 0 or (total > 0 and kind in ("pathological", "shard"))
    assert len(federation.test) == min(limit or 60, 60)
    assert all(len(client.train) >= 1 for client in federation.clients)
    assert (federation.public is None) == (public == 0)
    if federation.public:
        size = round(public * (limit or 300)) if public < 1 else public
        assert len(federation.public.tune) + len(federation.public.holdout) == size
        assert min(len(federation.public.tune), len(federation.public.holdout)) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_test_split_a_stratified_fifth_is_the_test(tmp_path, kind):
    folder = write(tmp_path / "d", rows(0, 200))
    federation = load(DataOptions(dataset=str(folder), partition=kind, clients=4, alpha=10))
    names = torch.cat([part.all()[0][:, 0] for part in parts(federation)])
    assert len(names.unique()) == len(names)
    assert federation.test.all()[1].bincount().tolist() == [10] * 4


def test_validation_stands_in_for_a_missing_test(tmp_path):
    write(tmp_path / "d" / "data", rows(1000, 30), "validation-00000-of-00001")
    folder = write(tmp_path / "d" / "data", rows(0, 200), "train-00000-of-00001").parent
    assert len(load(DataOptions(dataset=str(folder), partition="iid")).test) == 30


def test_default_digits_add_up():
    federation = load(DataOptions())
    assert (federation.dataset, federation.shape, federation.classes) == ("digits", (1, 8, 8), tuple("0123456789"))
    assert len(federation.test) == 360
    assert sum(map(len, parts(federation))) == 1797
    assert len(federation.public.tune) == 54
    assert len(federation.public.holdout) == 18
    assert [round(0.1 * (len(c.train) + len(c.test))) for c in federation.clients] == [len(c.test) for c in federation.clients]
    assert federation.clients[0].train.x is federation.clients[9].test.x is federation.public.tune.x


@pytest.mark.parametrize("count", [10, 20, 41])
def test_small_public_sets_hold_every_class(count):
    public = load(DataOptions(server_data=count, server_holdout=0.01)).public
    together = torch.cat([public.tune.all()[1], public.holdout.all()[1]]).bincount(minlength=10)
    assert together.min() >= count // 10
    assert together.max() <= -(-count // 10)


def test_fingerprint_is_of_who_holds_what(numbered, tmp_path):
    copy = shutil.copytree(numbered, tmp_path / "elsewhere")
    base = DataOptions(dataset=str(numbered), partition="iid")
    print_of = lambda **change: load(base.model_copy(update=change)).fingerprint  # noqa: E731
    assert print_of() == print_of(dataset=str(copy)) == print_of(alpha=7.0)
    changes = (
        {"clients": 9},
        {"limit": 299},
        {"own_test": 0.2},
        {"server_data": 0},
        {"server_holdout": 0.5},
        {"partition": "shard"},
    )
    assert len({print_of(), *(print_of(**change) for change in changes)}) == len(changes) + 1
    write(copy, rows(0, 300) | {"label": [0, 1, 2, 0] * 75})
    assert print_of(dataset=str(copy)) != print_of()


def test_fingerprint_covers_every_part_of_a_deal():
    def dealt(**change) -> Split:
        whole = {"train": ([0], [1]), "own": ([2], [3]), "tune": [4], "holdout": [5], "test": [6]} | change
        tensors = {name: tuple(map(torch.tensor, v)) if name in ("train", "own") else torch.tensor(v) for name, v in whole.items()}
        return Split(**tensors)

    changes = (
        {"train": ([1], [0])},
        {"own": ([3], [2])},
        {"own": ([2, 3], [])},
        {"tune": [7]},
        {"holdout": [7]},
        {"test": [7]},
    )
    prints = {fingerprint_split(content, dealt()) for content in "cd"} | {fingerprint_split("c", dealt(**c)) for c in changes}
    assert len(prints) == len(changes) + 2


def test_cold_load_is_silent_and_offline(cache, capfd, monkeypatch, numbered):
    def refuse(*_):
        raise AssertionError("a local data set touched the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    said: list[str] = []
    load(DataOptions(clients=12), said.append)
    load(DataOptions(dataset=str(numbered), partition="natural"))
    assert capfd.readouterr() == ("", "")
    assert len(said) == 3


def test_digits_are_scaled_by_sixteen():
    federation = load(DataOptions(server_data=0, own_test=0, clients=1, partition="iid"))
    x, _ = federation.clients[0].train.all()
    table = pq.read_table(ROOT / "core" / "data" / "digits" / "train.parquet")
    with Image.open(io.BytesIO(table["image"][0].as_py()["bytes"])) as image:
        values = torch.tensor(list(image.tobytes()), dtype=torch.float32).view(8, 8)
    assert values.max() == 16
    torch.testing.assert_close(x[0, 0], (values / 16 - 0.3054) / 0.3761)
    assert (x.dtype, x.is_contiguous()) == (torch.float32, True)
    assert abs(x.mean()) < 1e-3
    assert abs(x.std() - 1) < 1e-3


def test_unknown_data_are_normalised_by_channel_of_the_train_split(tmp_path):
    write(tmp_path / "d", {"a": [[[[5.0, 7.0]], [[1.0, 1.0]]]] * 3, "y": ["cat", "cat", "dog"]}, "test")
    grid = [[[[float(i), float(i + 1)]], [[3.0 * i, 100.0]]] for i in range(50)]
    write(tmp_path / "d", {"a": grid, "y": ["dog", "cat"] * 25})
    options = DataOptions(dataset=str(tmp_path / "d"), label_column="y", partition="iid", clients=1, server_data=0, own_test=0)
    federation = load(options)
    x, y = federation.clients[0].train.all()
    assert (federation.shape, federation.classes) == ((2, 1, 2), ("cat", "dog"))
    assert y.tolist() == [1, 0] * 25
    torch.testing.assert_close(x.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std((0, 2, 3), correction=0), torch.ones(2), atol=1e-5, rtol=0)
    limited = load(options.model_copy(update={"limit": 5})).clients[0].train.all()[0]
    assert len(limited) == 5
    assert all(any(torch.equal(row, other) for other in x) for row in limited)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"dataset": "mnits"}, r"^unknown data set 'mnits'; did you mean 'mnist'\? \(known: ag_news, "),
        ({"dataset": ""}, r"^unknown data set ''"),
        ({"dataset": "./no/mnist"}, r"^no folder or file './no/mnist' for --dataset; did you mean 'mnist'\?$"),
        ({"dataset": "no.parquet"}, r"^no folder or file 'no.parquet'"),
        ({"dataset": __file__}, r"test_loading.py' is neither a parquet, an npz nor a CSV file"),
        ({"clients": 1366}, r"^--clients 1366 is more than the 1365 training examples"),
        (
            {"alpha": 1e-6},
            r"--alpha 1e-06 leaves some of the 10 clients fewer than 2 of 1365 examples: raise --alpha, lower --cl",
        ),
        (
            {"partition": "pathological", "classes_per_client": 11},
            r"^--classes-per-client 11 is more than the 10 classes",
        ),
        (
            {"partition": "pathological", "clients": 1365},
            r"^1365 examples cannot be dealt to 1365 clients of 2 classes each",
        ),
        (
            {"partition": "shard", "clients": 700},
            r"^700 clients of 2 shards need 1400 examples, but clients have 1365: lower",
        ),
        (
            {"partition": "natural"},
            r"^digits has no owner column: name one with --id-column \(columns: image, label\)$",
        ),
        ({"partition": "natural", "id_column": "labl"}, r"^--id-column: unknown column 'labl'; did you mean 'label'\?"),
        ({"server_data": 0.001}, r"^--server-data 0.001 of 1437 training examples is 1 for the server, which needs 2"),
        ({"server_data": 1437}, r"^--server-data 1437 of 1437 training examples leaves the clients nothing"),
        ({"limit": 8}, r"^--server-data 0.05 of 8 training examples is 0 for the server"),
        ({"limit": 8, "server_data": 0}, r"^--clients 10 is more than the 8 training examples"),
        ({"input_column": "label"}, r"^column 'label' of digits holds neither images nor arrays of numbers$"),
        ({"label_column": "image"}, r"^column 'image' of digits holds no class labels"),
        (
            {"label_column": "lable"},
            r"^--label-column: unknown column 'lable'; did you mean 'label'\? \(known: image, label\)$",
        ),
    ],
)
def test_options_that_cannot_be_met(values, sentence):
    refused(values, sentence)


def test_given_normalisation():
    base = load(DataOptions())
    again = load(DataOptions(mean=tuple(base.preprocessing["mean"]), std=tuple(base.preprocessing["std"])))
    assert torch.equal(base.test.x, again.test.x)
    raw = load(DataOptions(mean=(0.0,), std=(1.0,)))
    assert float(raw.test.x.max()) == 16.0
    refused({"mean": (1.0, 2.0)}, r"^--mean has 2 values, but the inputs have 1 channels$")
    refused({"std": (0.0,)}, r"^--std must be above 0")
