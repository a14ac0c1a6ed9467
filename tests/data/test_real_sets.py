"""Real data sets read as they are: classes, people, shapes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from helpers.data_files import parts, real_folder, refused
from hetfl.config import DataOptions
from hetfl.data.dataset import FederatedDataset
from hetfl.data.loading import load


def everyone(federation: FederatedDataset) -> list[int]:
    return torch.cat([part.all()[1] for part in parts(federation)[:-1]]).bincount().tolist()


@pytest.mark.slow
def test_mnist(monkeypatch):
    monkeypatch.setenv("HETFL_DATA", str(Path(real_folder("mnist")).parent))
    federation = load(DataOptions(dataset="mnist"))
    assert everyone(federation) == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert federation.test.all()[1].bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert federation.shape == (1, 28, 28)
    x = federation.clients[0].train.x
    assert abs(float(x.mean())) < 1e-3
    assert abs(float(x.std()) - 1) < 1e-3


def sample(name: str, folder: Path, count: int) -> str:
    """The first rows of both splits of a real data set."""
    source = Path(real_folder(name))
    folder.mkdir()
    for split in ("train", "test"):
        table = pq.read_table(source / f"{split}-00000-of-00001.parquet").slice(0, count)
        pq.write_table(table, folder / f"{split}.parquet")
    return str(folder)


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
    federation = load(DataOptions(dataset=real_folder("sp_sw_har"), partition="natural"))
    assert (len(federation.clients), federation.shape) == (23, (1, 100, 6))
    assert federation.classes == ("SEATED", "STANDING_UP", "WALKING", "TURNING", "SITTING_DOWN")
    users = pq.read_table(Path(real_folder("sp_sw_har")) / "train-00000-of-00001.parquet")["user"].to_pylist()
    sizes = [len(client.train) + len(client.test) for client in federation.clients]
    assert all(size <= Counter(users)[user] for size, user in zip(sizes, sorted(set(users)), strict=True))
    assert sum(sizes) == 6970 - round(0.05 * 6970)


def test_wiar_height_by_height():
    federation = load(DataOptions(dataset=real_folder("wiar_height"), partition="natural"))
    assert (len(federation.clients), federation.shape, len(federation.test)) == (3, (1, 64, 90), 288)
    assert (len(federation.classes), federation.model) == (16, "cnn1d")


def test_ag_news_is_hashed(tmp_path):
    federation = load(DataOptions(dataset=real_folder("ag_news"), limit=200, tokens=32, vocab=1000, alpha=1))
    assert (federation.shape, federation.inputs.vocab, federation.model) == ((32,), 1000, "encoder")
    x = federation.test.x
    assert x.dtype == torch.int64
    assert bool((x[:, 0] == 1).all())
    assert int(x.max()) < 1000
    assert federation.preprocessing == {
        "input_column": "text",
        "label_column": "label",
        "task": "classify",
        "tokens": 32,
        "vocab": 1000,
    }
