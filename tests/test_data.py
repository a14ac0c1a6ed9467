"""Data: nobody shares an example, the same options give the same bits, bad input ends in one clear sentence."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import datasets
import httpx
import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hetfl.config import DataOptions
from hetfl.data.catalog import KNOWN, find_dataset
from hetfl.data.dataset import FederatedDataset
from hetfl.data.loading import fingerprint_split, load
from hetfl.data.partition import Split, split_rows, stratified_order
from hetfl.data.tokens import hash_tokens
from hetfl.errors import UsageError

REAL = Path(__file__).parents[2] / "shared" / "data"

REPO = Path(__file__).parents[1]

KINDS = ("iid", "dirichlet", "pathological", "shard", "natural")

IMAGES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})


def real(name: str) -> str:
    if not (REAL / name).is_dir():
        pytest.skip(f"real data set {REAL / name} is not on this machine")
    return str(REAL / name)


@pytest.fixture(autouse=True, scope="module")
def shared_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HETFL_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("HETFL_DATA", raising=False)
        yield


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HETFL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(folder: Path, columns: dict, name: str = "train", features=None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(datasets.Dataset.from_dict(columns, features=features).with_format("arrow")[:], folder / f"{name}.parquet")
    return folder


def rows(first: int, count: int, classes: int = 4) -> dict:
    """Examples whose first input is their own number."""
    numbers = range(first, first + count)
    return {
        "features": [[float(n), float(n % classes)] for n in numbers],
        "label": [n % classes for n in numbers],
        "user": [f"u{n % 7}" for n in numbers],
    }


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("numbered")
    write(folder, rows(1000, 60), "test")
    return write(folder, rows(0, 300))


def png(value: int, size=(4, 4), mode="L") -> dict:
    data = io.BytesIO()
    Image.new(mode, size, value if mode in ("L", "I;16") else (value,) * len(mode)).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def parts(federation: FederatedDataset) -> list:
    public = [federation.public.tune, federation.public.holdout] if federation.public else []
    return [part for client in federation.clients for part in (client.train, client.test)] + public + [federation.test]


def same(one: FederatedDataset, other: FederatedDataset) -> bool:
    pairs = zip(parts(one), parts(other), strict=True)
    equal = all(torch.equal(a.index, b.index) and all(map(torch.equal, a.all(), b.all())) for a, b in pairs)
    return equal and torch.equal(one.class_counts, other.class_counts) and one.fingerprint == other.fingerprint


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


def test_counts_and_labels_say_who_holds_what():
    federation = load(DataOptions(clients=6, partition="pathological", classes_per_client=3))
    assert federation.class_counts.shape == (6, 10)
    for client, counts in zip(federation.clients, federation.class_counts, strict=True):
        assert client.train.all()[1].bincount(minlength=10).tolist() == counts.tolist()
        assert client.held_classes.dtype == torch.bool
        assert client.held_classes.nonzero().flatten().tolist() == sorted(set(client.train.all()[1].tolist()))
        assert int(client.held_classes.sum()) <= 3
        assert set(client.test.all()[1].tolist()) <= set(torch.cat([client.train.all()[1], client.test.all()[1]]).tolist())


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


def test_every_beginning_of_a_spread_is_in_proportion():
    y = torch.tensor([0] * 80 + [1] * 19 + [2])
    order = stratified_order(y, torch.Generator().manual_seed(3))
    assert sorted(order.tolist()) == list(range(100))
    assert sorted(y[order[:3]].tolist()) == [0, 1, 2]
    assert y[order[:50]].bincount().tolist() in ([39, 10, 1], [40, 9, 1])


def test_dirichlet_is_skewed_and_iid_is_not():
    skewed = load(DataOptions(alpha=0.1, clients=5)).class_counts.double()
    flat = load(DataOptions(partition="iid", clients=5)).class_counts.double()
    share = lambda counts: (counts.max(1).values / counts.sum(1)).mean()  # noqa: E731
    assert share(skewed) > 0.25 > 0.2 > share(flat)


def test_natural_clients_are_the_people(numbered):
    federation = load(DataOptions(dataset=str(numbered), partition="natural", clients=3))
    assert len(federation.clients) == 7
    numbers = [torch.cat([c.train.all()[0], c.test.all()[0]])[:, 0] for c in federation.clients]
    mean, std = torch.arange(300.0).mean(), torch.arange(300.0).std(correction=0)
    assert [set((n * std + mean).round().int().remainder(7).tolist()) for n in numbers] == [{i} for i in range(7)]


def test_label_can_be_the_owner(numbered):
    federation = load(DataOptions(dataset=str(numbered), partition="natural", id_column="label"))
    assert (federation.class_counts > 0).tolist() == torch.eye(4).bool().tolist()


def test_a_client_of_one_example_trains_on_it(tmp_path):
    folder = write(tmp_path / "d", rows(0, 8) | {"user": list("aaaaaaab")})
    write(folder, rows(100, 4), "test")
    federation = load(DataOptions(dataset=str(folder), partition="natural", server_data=0, own_test=0.9))
    assert [(len(c.train), len(c.test)) for c in federation.clients] == [(1, 6), (1, 0)]
    assert list(federation.clients[1].test.batches(4)) == []


def test_batches_cover_every_example_once(numbered):
    part = load(DataOptions(dataset=str(numbered), clients=1, partition="iid")).clients[0].train
    plain = list(part.batches(100, None))
    assert [len(y) for _, y in plain] == [100, 100, 57]
    assert torch.equal(torch.cat([x for x, _ in plain]), part.all()[0])
    first, again, other = (torch.cat([x[:, 0] for x, _ in part.batches(7, torch.Generator().manual_seed(s))]) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first.sort().values, part.all()[0][:, 0].sort().values)
    x, y = next(part.batches(50, torch.Generator().manual_seed(0)))
    std = torch.arange(300.0).std(correction=0)
    assert torch.equal((x[:, 0] * std + 149.5).round().long().remainder(4), y)


@pytest.mark.parametrize("kind", KINDS)
def test_same_options_same_bits_with_and_without_cache(numbered, cache, monkeypatch, kind):
    options = DataOptions(dataset=str(numbered), partition=kind, clients=5, alpha=1)
    miss, hit = load(options), load(options)
    monkeypatch.setenv("HETFL_CACHE", os.devnull)
    assert same(miss, hit)
    assert same(miss, load(options))
    assert len(list(cache.iterdir())) == 2
    other = load(options.model_copy(update={"partition_seed": 1}))
    assert other.fingerprint != miss.fingerprint


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


@pytest.mark.parametrize("kind", ["dirichlet", "pathological", "shard"])
def test_partition_seed_draws_the_skew_anew(numbered, kind):
    options = DataOptions(dataset=str(numbered), partition=kind, clients=6, alpha=1, server_data=0, own_test=0)
    assert not torch.equal(load(options).class_counts, load(options.model_copy(update={"partition_seed": 1})).class_counts)


def test_changed_files_are_read_again(tmp_path):
    folder = write(tmp_path / "d", rows(0, 100))
    options = DataOptions(dataset=str(folder), partition="iid", clients=2)
    before = load(options)
    write(folder, rows(0, 200))
    assert sum(map(len, parts(load(options)))) == 2 * sum(map(len, parts(before)))


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "text", "folder"])
def test_damaged_cache_is_rebuilt(cache, harm):
    whole = load(DataOptions())
    for file in cache.iterdir():
        data = file.read_bytes()
        flipped = data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]
        file.unlink()
        if harm == "folder":
            file.mkdir()
        else:
            file.write_bytes({"cut": data[:-1], "flip": flipped, "empty": b"", "text": b"hello" * 99}[harm])
    assert same(load(DataOptions()), whole)
    assert not list(cache.glob("*.tmp"))
    assert harm == "folder" or sum(file.stat().st_size for file in cache.iterdir()) > 100_000


def test_warm_load_imports_no_data_library(cache):
    load(DataOptions())
    code = (
        "import sys; from hetfl.data.loading import load; from hetfl.config import DataOptions; load(DataOptions());"
        "print([m for m in ('datasets', 'flwr_datasets', 'PIL', 'pyarrow', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, env=environment()
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


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
    table = pq.read_table(REPO / "core" / "data" / "digits" / "train.parquet")
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


def test_grey_among_coloured_images_become_coloured(tmp_path):
    images = [png(9, mode="RGB"), png(7), png(5, mode="RGBA"), png(3, mode="RGB")] * 5
    folder = write(tmp_path / "d", {"image": images, "label": [0, 1] * 10}, features=IMAGES)
    federation = load(DataOptions(dataset=str(folder / "train.parquet"), partition="iid", clients=1, server_data=0))
    assert (federation.dataset, federation.shape, federation.classes) == ("train", (3, 4, 4), ("a", "b"))


def test_short_names_are_looked_for_on_the_shelf(tmp_path, monkeypatch):
    images = {"image": [png(i) for i in range(40)], "label": [0, 1] * 20}
    write(tmp_path / "mnist", images, features=IMAGES)
    monkeypatch.setenv("HETFL_DATA", str(tmp_path))
    federation = load(DataOptions(dataset="mnist", clients=1, partition="iid", server_data=0))
    values = (federation.test.x[:, 0, 0, 0] * 0.3081 + 0.1307) * 255
    assert values.round().int().tolist() == list(range(40))
    assert find_dataset("ylecun/mnist").known is KNOWN["mnist"]
    monkeypatch.delenv("HETFL_DATA")
    assert find_dataset("mnist").hub == "ylecun/mnist"


def hub(monkeypatch, answer, splits=None):
    def dataset_info(self, name, **_):
        if isinstance(answer, Exception):
            raise answer
        return huggingface_hub.hf_api.DatasetInfo(id=name, sha=answer)

    def load_dataset(name, revision=None):
        assert revision == answer
        return splits

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def test_hub_data_sets_are_cached_too(cache, monkeypatch):
    split = datasets.Dataset.from_dict({"image": [png(i) for i in range(40)], "label": [0, 1] * 20}, features=IMAGES)
    hub(monkeypatch, "abc", datasets.DatasetDict(train=split, test=split))
    options = DataOptions(dataset="some/thing", clients=2, partition="iid")
    first = load(options)
    assert (first.dataset, first.shape, len(first.test)) == ("some/thing", (1, 4, 4), 40)
    hub(monkeypatch, httpx.ConnectError("down"))
    assert same(load(options), first)


NOT_FOUND = huggingface_hub.errors.RepositoryNotFoundError(
    "404", response=httpx.Response(404, request=httpx.Request("GET", "http://x"))
)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (
            httpx.ConnectError("no route"),
            r"cannot load data set 'a/b': .*Hub could not be reached \(no route\); the folder of a",
        ),
        (
            NOT_FOUND,
            r"the Hub has no data set 'a/b' that is open to you; the folder of a local copy can be given instead$",
        ),
        (
            ValueError("Config name is missing.\nPick"),
            r"cannot load data set 'a/b': Config name is missing; the folder",
        ),
        (None, r"data set 'a/b' has no train split \(it has unseen\)$"),
    ],
)
def test_hub_failures_are_one_sentence(cache, monkeypatch, answer, sentence):
    hub(monkeypatch, answer, {"unseen": None})
    refused({"dataset": "a/b"}, sentence)


def refused(values: dict, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        load(DataOptions(**values))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"dataset": "mnits"}, r"^unknown data set 'mnits'; did you mean 'mnist'\? \(known: ag_news, "),
        ({"dataset": ""}, r"^unknown data set ''"),
        ({"dataset": "./no/mnist"}, r"^no folder or file './no/mnist' for --dataset; did you mean 'mnist'\?$"),
        ({"dataset": "no.parquet"}, r"^no folder or file 'no.parquet'"),
        ({"dataset": __file__}, r"test_data.py' is neither a parquet nor an npz file"),
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


PLAIN = rows(0, 40)

NUMBERS = datasets.Features({"features": datasets.List(datasets.Value("float32")), "label": datasets.Value("int64")})


@pytest.mark.parametrize(
    ("columns", "features", "sentence"),
    [
        (
            {"features": PLAIN["features"]},
            None,
            r"has no label column: name one with --label-column \(columns: features\)$",
        ),
        (
            {"label": [0, 1], "when": [1.5, 2.5]},
            None,
            r"has no image, numeric or text input column: name one with --input-column",
        ),
        (
            PLAIN | {"more": PLAIN["features"]},
            None,
            r"several image, numeric or text input columns \(features, more\): name one",
        ),
        (PLAIN | {"y": PLAIN["label"]}, None, r"has several label columns \(label, y\): name one with --label-column"),
        ({"features": [], "label": []}, NUMBERS, r"^the train split of d has no rows$"),
        (PLAIN | {"label": [None] * 40}, None, r"no label column|no class labels"),
        ({"features": [[1.0]] * 3, "label": [0, 1, None]}, NUMBERS, r"^column 'label' of d has missing"),
        (
            {"features": [[1.0], [1.0, 2.0]], "label": [0, 1]},
            NUMBERS,
            r"^column 'features' of d has arrays of different shapes",
        ),
        (
            {"features": [[1.0], None], "label": [0, 1]},
            NUMBERS,
            r"^column 'features' of d has arrays of different shapes",
        ),
        ({"features": [[1.0], [None]], "label": [0, 1]}, NUMBERS, r"^column 'features' of d has missing values$"),
        ({"features": [[1.0], [float("nan")]], "label": [0, 1]}, NUMBERS, r"has values that are not finite$"),
        (
            {"image": [png(1), png(1, (5, 4))], "label": [0, 1]},
            IMAGES,
            r"images of different sizes \(\(4, 4\) and \(4, 5\)\)",
        ),
        (
            {"image": [png(1), None], "label": [0, 1]},
            IMAGES,
            r"^column 'image' of d has an image that cannot be decoded",
        ),
        ({"image": [{"bytes": b"x", "path": None}], "label": [0]}, IMAGES, r"image that cannot be decoded"),
        ({"image": [png(1, mode="I;16")], "label": [0]}, IMAGES, r"cannot be decoded: mode I.* is not 8 bits"),
        ({"image": [png(1)], "label": [-1]}, IMAGES, r"^column 'label' of d has examples without a label$"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path, columns, features, sentence):
    refused({"dataset": str(write(tmp_path / "d", columns, features=features))}, sentence)


def test_files_that_cannot_be_used(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    refused({"dataset": str(folder)}, r"^folder '.*d' holds no parquet or npz file")
    write(folder, PLAIN, "test")
    refused({"dataset": str(folder)}, r"has no train split: name its files train")
    (folder / "train.parquet").write_bytes(b"PAR1 not really")
    refused({"dataset": str(folder)}, r"train.parquet' cannot be read as parquet: ")
    write(folder, PLAIN)
    whole = (folder / "train.parquet").read_bytes()
    (folder / "train.parquet").write_bytes(whole[:300] + bytes(200) + whole[500:])
    refused({"dataset": str(folder)}, r"train.parquet' cannot be read as parquet: ")
    write(folder, PLAIN)
    write(folder, {"features": [[1.0, 2.0]]}, "test")
    refused({"dataset": str(folder)}, r"test.parquet' cannot be read as parquet: it has no column 'label'")
    write(folder, {"features": [[1.0, 2.0, 3.0]], "label": [0]}, "test")
    refused({"dataset": str(folder)}, r"^train and test inputs of d differ in shape: 2 and 3$")


def test_deal_is_the_same_for_every_order_of_calls():
    y = torch.arange(200).remainder(5)
    options = DataOptions(alpha=1, clients=4)
    first = split_rows(options, y)
    torch.rand(7)
    second = split_rows(options, y)
    assert all(map(torch.equal, first.train + first.own, second.train + second.own))


def sample(name: str, folder: Path, count: int) -> str:
    """The first rows of both splits of a real data set."""
    source = Path(real(name))
    folder.mkdir()
    for split in ("train", "test"):
        table = pq.read_table(source / f"{split}-00000-of-00001.parquet").slice(0, count)
        pq.write_table(table, folder / f"{split}.parquet")
    return str(folder)


def everyone(federation: FederatedDataset) -> list[int]:
    return torch.cat([part.all()[1] for part in parts(federation)[:-1]]).bincount().tolist()


def test_mnist(monkeypatch):
    monkeypatch.setenv("HETFL_DATA", str(Path(real("mnist")).parent))
    federation = load(DataOptions(dataset="mnist"))
    assert everyone(federation) == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert federation.test.all()[1].bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert federation.shape == (1, 28, 28)
    x = federation.clients[0].train.x
    assert abs(float(x.mean())) < 1e-3
    assert abs(float(x.std()) - 1) < 1e-3


def test_cifar10_finds_its_columns(tmp_path, monkeypatch):
    folder = sample("cifar10", tmp_path / "cifar10", 300)
    plain = load(DataOptions(dataset=folder, partition="iid", clients=3))
    assert (plain.shape, plain.classes[0], plain.classes[9]) == ((3, 32, 32), "airplane", "truck")
    labels = Counter(pq.read_table(Path(folder) / "train.parquet")["label"].to_pylist())
    assert everyone(plain) == [labels[i] for i in range(10)]
    monkeypatch.setenv("HETFL_DATA", str(tmp_path))
    known = load(DataOptions(dataset="cifar10", partition="iid", clients=3))
    assert known.fingerprint == plain.fingerprint
    red = known.test.x[:, 0] * 0.2023 + 0.4914
    assert 0 <= red.min() <= red.max() <= 1.0001


def test_cifar100_needs_its_label_named(tmp_path, monkeypatch):
    folder = sample("cifar100", tmp_path / "hundred", 300)
    refused({"dataset": folder}, r"several label columns \(fine_label, coarse_label\): name one with --label-column")
    assert len(load(DataOptions(dataset=folder, label_column="coarse_label", alpha=1)).classes) == 20
    sample("cifar100", tmp_path / "cifar100", 300)
    monkeypatch.setenv("HETFL_DATA", str(tmp_path))
    assert len(load(DataOptions(dataset="cifar100", alpha=1)).classes) == 100


def test_sp_sw_har_has_its_people_as_clients():
    federation = load(DataOptions(dataset=real("sp_sw_har"), partition="natural"))
    assert (len(federation.clients), federation.shape) == (23, (1, 100, 6))
    assert federation.classes == ("SEATED", "STANDING_UP", "WALKING", "TURNING", "SITTING_DOWN")
    users = pq.read_table(Path(real("sp_sw_har")) / "train-00000-of-00001.parquet")["user"].to_pylist()
    sizes = [len(client.train) + len(client.test) for client in federation.clients]
    assert all(size <= Counter(users)[user] for size, user in zip(sizes, sorted(set(users)), strict=True))
    assert sum(sizes) == 6970 - round(0.05 * 6970)


def test_wiar_height_by_height():
    federation = load(DataOptions(dataset=real("wiar_height"), partition="natural"))
    assert (len(federation.clients), federation.shape, len(federation.test)) == (3, (1, 64, 90), 288)
    assert (len(federation.classes), federation.model) == (16, "cnn1d")


def test_ag_news_is_hashed(tmp_path):
    federation = load(DataOptions(dataset=real("ag_news"), limit=200, tokens=32, vocab=1000, alpha=1))
    assert (federation.shape, federation.inputs.vocab, federation.model) == ((32,), 1000, "encoder")
    x = federation.test.x
    assert x.dtype == torch.int64
    assert bool((x[:, 0] == 1).all())
    assert int(x.max()) < 1000
    assert federation.preprocessing == {"input_column": "text", "label_column": "label", "tokens": 32, "vocab": 1000}


def test_hashed_tokens():
    """Same word, same id, whatever else is in the text; case does not count; padding is 0, the start token 1."""
    ids = hash_tokens(["A cat.", "the CAT sat on a mat today", ""], 5, 50)
    assert ids.dtype == torch.int32
    assert ids[:, 0].tolist() == [1, 1, 1]
    assert ids[0, 2] == ids[1, 2]
    assert ids[0, 4] == 0
    assert ids[2, 1:].tolist() == [0, 0, 0, 0]
    assert bool((ids[1, 1:] >= 2).all())
    assert int(hash_tokens(["word"], 2, 8192)[0, 1]) == 2 + zlib.crc32(b"word") % 8190


def npz(folder: Path, name: str, **arrays) -> str:
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{name}.npz", **arrays)
    return str(folder)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "model"),
    [
        ("dcd", (36, 36), 5, "fedconv-cnn"),
        ("dcd", (1, 36, 36), 5, "fedconv-cnn"),
        ("harbox", (30, 30), 5, "fedconv-har"),
        ("wiar", (90, 250), 16, "fedconv-cnn"),
    ],
)
def test_npz_of_the_papers_shapes(tmp_path, name, shape, classes, model):
    draw = np.random.default_rng(0)
    for split, size in (("train", 96), ("test", 32)):
        npz(
            tmp_path / name, split,
            x=draw.normal(size=(size, *shape)).astype("float32"), y=np.arange(size) % classes, user=np.arange(size) % 3,
        )  # fmt: skip
    natural = {} if name == "dcd" else {"partition": "natural"}
    federation = load(DataOptions(dataset=str(tmp_path / name), clients=3, alpha=10, server_data=0.25, **natural))
    assert (federation.shape, len(federation.classes), len(federation.test)) == ((1, *shape[-2:]), classes, 32)
    assert (federation.model, len(federation.clients)) == (model, 3)


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"x": np.zeros((4, 3))}, r"^d has no array 'y' or 'label': name one with --label-column \(arrays: x\)$"),
        ({"x": np.zeros((4, 3)), "y": np.arange(3)}, r"^the arrays of d must have one row for each example, but hold x 4, y 3$"),
        ({"x": np.zeros(4), "y": np.arange(4)}, r"^array 'x' of d holds no inputs"),
        ({"x": np.full((4, 3), np.nan), "y": np.arange(4)}, r"^array 'x' of d has values that are not finite$"),
        ({"x": np.zeros((4, 3)), "y": np.zeros(4)}, r"^array 'y' of d holds no class labels"),
        ({"x": np.zeros((4, 3)), "y": np.array([None] * 4)}, r"train.npz' cannot be read as npz"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path, arrays, sentence):
    refused({"dataset": npz(tmp_path / "d", "train", **arrays)}, sentence)


def test_data_that_nobody_can_download_ask_for_a_folder():
    refused({"dataset": "harbox"}, r"^data set 'harbox' cannot be downloaded: give its folder with --dataset PATH/harbox")


@given(st.integers(2, 20), st.sampled_from([0.1, 0.5, 2.0]), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_quantity_skew_is_of_sizes(clients, alpha, seed):
    options = DataOptions(partition="quantity", clients=clients, alpha=alpha, partition_seed=seed)
    sizes = [len(c.train) + len(c.test) for c in load(options).clients]
    assert len(sizes) == clients
    assert min(sizes) >= 2
    assert sum(sizes) == 1365


def test_quantity_skew_grows_as_alpha_falls():
    spreads = [max(len(c.train) for c in load(DataOptions(partition="quantity", alpha=alpha)).clients) for alpha in (1e4, 1, 0.1)]
    assert spreads == sorted(spreads)
    assert spreads[0] < 140


def test_given_normalisation():
    base = load(DataOptions())
    again = load(DataOptions(mean=tuple(base.preprocessing["mean"]), std=tuple(base.preprocessing["std"])))
    assert torch.equal(base.test.x, again.test.x)
    raw = load(DataOptions(mean=(0.0,), std=(1.0,)))
    assert float(raw.test.x.max()) == 16.0
    refused({"mean": (1.0, 2.0)}, r"^--mean has 2 values, but the inputs have 1 channels$")
    refused({"std": (0.0,)}, r"^--std must be above 0")
