"""Data sets written to disk, and what a federation of them holds."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from helpers.paths import REAL
from hetfl.config import DataOptions
from hetfl.data.dataset import FederatedDataset
from hetfl.data.loading import load
from hetfl.errors import UsageError

KINDS = ("iid", "dirichlet", "pathological", "shard", "natural")


IMAGES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})


def real_folder(name: str) -> str:
    if not (REAL / name).is_dir():
        pytest.skip(f"real data set {REAL / name} is not on this machine")
    return str(REAL / name)


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
    return equal and torch.equal(one.counts, other.counts) and one.fingerprint == other.fingerprint


def refused(values: dict, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence) as caught:
        load(DataOptions(**values))
    assert "\n" not in str(caught.value)
