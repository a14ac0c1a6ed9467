"""npz files of the papers' shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers.data_files import refused
from hetfl.config import DataOptions
from hetfl.data.loading import load


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
        ({"x": np.zeros((4, 3)), "y": np.array([1j] * 4)}, r"^array 'y' of d holds no class labels"),
        ({"x": np.zeros((4, 3)), "y": np.array([None] * 4)}, r"train.npz' cannot be read as npz"),
    ],
)
def test_npz_that_cannot_be_used(tmp_path, arrays, sentence):
    refused({"dataset": npz(tmp_path / "d", "train", **arrays)}, sentence)
