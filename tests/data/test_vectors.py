"""Data that people have at hand: vectors, tables with a column for each feature, CSV, folders of pictures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import hetfl
from hetfl.config import DataOptions
from hetfl.data.loading import load
from hetfl.errors import UsageError

SMALL = {"extract": "heterofl", "rounds": 1, "epochs": 1, "pretrain_steps": 0, "clients": 3, "server_data": 0.1, "partition": "iid",
         "progress": False, "control": False}  # fmt: skip


def vectors(n=90):
    """Separable vectors (n, 8) of three classes."""
    y = np.arange(n) % 3
    return (np.random.default_rng(0).normal(size=(n, 8)) + 3 * np.eye(8)[y]).astype("float32"), y


def frame(label="label", names=("cat", "dog", "owl")):
    x, y = vectors()
    table = pd.DataFrame(x, columns=[f"f{i}" for i in range(8)])
    table[label] = [names[i] for i in y] if names else y
    return table


def write_npz(path):
    x, y = vectors()
    np.savez(path / "vec.npz", x=x, y=y)
    return path / "vec.npz"


def write_lists(path):
    x, y = vectors()
    pd.DataFrame({"features": list(x), "label": y}).to_parquet(path / "lists.parquet")
    return path / "lists.parquet"


def write_wide(path):
    frame(names=None).to_parquet(path / "wide.parquet")
    return path / "wide.parquet"


def write_csv(path):
    frame(names=None).to_csv(path / "wide.csv", index=False)
    return path / "wide.csv"


@pytest.mark.parametrize("write", [write_npz, write_lists, write_wide, write_csv])
def test_vectors_train_with_the_default_model(tmp_path, write):
    run = hetfl.run(data=str(write(tmp_path)), **SMALL)
    assert run.options.model == "mlp"
    assert run.model(torch.zeros(2, 8)).shape == (2, 3)
    assert run.submodel(0.5)(torch.zeros(2, 8)).shape == (2, 3)


def test_the_four_hold_the_same_examples(tmp_path):
    found = [
        load(DataOptions(dataset=str(write(tmp_path)), clients=2)) for write in (write_npz, write_lists, write_wide, write_csv)
    ]
    for other in found[1:]:
        assert torch.allclose(other.test.all()[0], found[0].test.all()[0], atol=1e-5)
        assert torch.equal(other.class_counts, found[0].class_counts)


def test_a_label_of_words_is_named(tmp_path):
    frame("species").to_csv(tmp_path / "birds.csv", index=False)
    with pytest.raises(UsageError, match="has no label column: name one with --label-column"):
        load(DataOptions(dataset=str(tmp_path / "birds.csv"), clients=2))
    data = load(DataOptions(dataset=str(tmp_path / "birds.csv"), clients=2, label_column="species"))
    assert (data.classes, data.shape) == (("cat", "dog", "owl"), (8,))


def test_a_text_in_csv_stays_text(tmp_path):
    table = pd.DataFrame({"text": ["good day", "bad day"] * 20, "label": [1, 0] * 20, "stars": [5, 1] * 20})
    table.to_csv(tmp_path / "said.csv", index=False)
    data = load(DataOptions(dataset=str(tmp_path / "said.csv"), clients=2))
    texts, labels = (torch.cat(parts) for parts in zip(*(c.train.all() for c in data.clients), strict=True))
    assert data.inputs.vocab > int(texts.max())
    good, bad = ({tuple(t.tolist()) for t in texts[labels == k]} for k in (1, 0))
    assert len(good) == len(bad) == 1, "two texts of two words, whatever the stars"
    assert [a == b for a, b in zip(good.pop(), bad.pop(), strict=True)].count(False) == 1


def test_missing_values_are_refused(tmp_path):
    table = frame(names=None)
    table.loc[3, "f2"] = None
    table.to_csv(tmp_path / "holes.csv", index=False)
    with pytest.raises(UsageError, match="column 'f2' has missing values"):
        load(DataOptions(dataset=str(tmp_path / "holes.csv"), clients=2))


def write_pictures(path, sizes=((6, 6),), splits=("",)):
    for split in splits:
        for label in ("cat", "dog"):
            folder = path / "pets" / split / label
            folder.mkdir(parents=True)
            for i in range(20):
                Image.new("RGB", sizes[i % len(sizes)], (i, 200 if label == "cat" else 20, 0)).save(folder / f"{i}.png")
    return path / "pets"


@pytest.mark.parametrize("splits", [("",), ("train", "test")])
def test_a_folder_of_pictures_for_each_class(tmp_path, splits):
    data = load(DataOptions(dataset=str(write_pictures(tmp_path, splits=splits)), clients=2))
    assert (data.classes, data.shape) == (("cat", "dog"), (3, 6, 6))
    assert len(data.test) == (40 if len(splits) > 1 else 8)


def test_pictures_of_unequal_sizes_say_how_to_resize_them(tmp_path):
    with pytest.raises(UsageError, match=r"images of different sizes \(\(6, 6\) and \(7, 6\)\): resize them first, such as"):
        load(DataOptions(dataset=str(write_pictures(tmp_path, sizes=((6, 6), (6, 7)))), clients=2))
