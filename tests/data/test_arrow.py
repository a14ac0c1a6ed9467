"""Parquet files: columns found, pictures decoded, refusals in one sentence."""

from __future__ import annotations

import datasets
import pytest

from helpers.data_files import IMAGES, png, refused, rows, write
from hetfl.config import DataOptions
from hetfl.data.loading import load


def test_grey_among_coloured_images_become_coloured(tmp_path):
    images = [png(9, mode="RGB"), png(7), png(5, mode="RGBA"), png(3, mode="RGB")] * 5
    folder = write(tmp_path / "d", {"image": images, "label": [0, 1] * 10}, features=IMAGES)
    federation = load(DataOptions(dataset=str(folder / "train.parquet"), partition="iid", clients=1, server_data=0))
    assert (federation.dataset, federation.shape, federation.classes) == ("train", (3, 4, 4), ("a", "b"))


NUMBERS = datasets.Features({"features": datasets.List(datasets.Value("float32")), "label": datasets.Value("int64")})


PLAIN = rows(0, 40)


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
    refused({"dataset": str(folder)}, r"^folder '.*d' holds no parquet, npz or CSV file")
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
