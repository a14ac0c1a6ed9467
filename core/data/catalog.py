"""The data sets that have a short name, and where a data set is: in a folder, a file or on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hetfl.config import DataOptions
from hetfl.data.dialects import WORDS, make_dialects
from hetfl.errors import UsageError, nearest, unknown

GIVEN = "object:"  # how the names of data and models begin that a program has handed over


@dataclass(frozen=True)
class DatasetInfo:
    """A data set that has a short name, as docs/data.md lists it.

    Raw values are divided by `scale`, then normalised by `mean` and `std` of each channel (both empty: the train split's own).
    `owner` is the column of its natural partition, `model` what a run takes where none is named; `shape` and `classes` are
    those of the data as published, `augment` is how papers augment them. `hub` is empty where nobody can download it: then a
    folder must be given.
    """

    hub: str
    input: str
    label: str
    shape: tuple[int, ...]
    classes: int
    model: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    scale: float = 255.0
    owner: str | None = None
    layout: str = "parquet"
    augment: tuple[Literal["crop", "flip"], ...] = ()
    note: str = ""
    task: str = "classify"

    @property
    def text(self) -> bool:
        """Whether the inputs are text."""
        return not self.shape


def image_dataset(
    hub: str, label: str, shape: tuple[int, ...], classes: int, model: str, mean: Any, std: Any, **more: Any
) -> DatasetInfo:
    """An image data set; `more` are further fields of DatasetInfo."""
    return DatasetInfo(hub, more.pop("input", "image"), label, shape, classes, model, mean, std, **more)


GREY = (1, 28, 28)

COLOUR = (3, 32, 32)

CROPS: tuple[Literal["crop", "flip"], ...] = ("crop", "flip")

KNOWN = {
    "digits": image_dataset(
        "", "label", (1, 8, 8), 10, "fedconv-cnn", (0.3054,), (0.3761,), scale=16.0, note="embedded in hetfl; 1,797 examples"
    ),
    "mnist": image_dataset("ylecun/mnist", "label", GREY, 10, "fedconv-cnn", (0.1307,), (0.3081,)),
    "fashion-mnist": image_dataset("zalando-datasets/fashion_mnist", "label", GREY, 10, "fedconv-cnn", (0.2860,), (0.3530,)),
    "cifar10": image_dataset(
        "uoft-cs/cifar10", "label", COLOUR, 10, "resnet18", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), input="img",
        augment=CROPS,
    ),
    "cifar100": image_dataset(
        "uoft-cs/cifar100", "fine_label", COLOUR, 100, "resnet18", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
        input="img", augment=CROPS, note="--label-column coarse_label gives the 20 superclasses",
    ),
    "cinic10": image_dataset(
        "flwrlabs/cinic10", "label", COLOUR, 10, "googlenet", (0.4789, 0.4723, 0.4305), (0.2421, 0.2383, 0.2587),
        note="FedConv's GoogLeNet", augment=CROPS,
    ),
    "dialects": DatasetInfo(
        "", "text", "dialect", (), WORDS + 2, "decoder", task="lm", note="made by hetfl: 3,000 sentences of four languages"
    ),
    "ag_news": DatasetInfo(
        "fancyzhx/ag_news", "text", "label", (), 4, "encoder", note="hashed words, nothing learned from clients"
    ),
    "dcd": DatasetInfo(
        "", "x", "y", (1, 36, 36), 5, "fedconv-cnn", layout="npz", note="FedConv's depth camera images"
    ),
    "harbox": DatasetInfo(
        "", "x", "y", (1, 30, 30), 5, "fedconv-har", owner="user", layout="npz", note="900 values as 30x30 (FedConv)"
    ),
    "wiar": DatasetInfo("", "x", "y", (1, 90, 250), 16, "fedconv-cnn", owner="user", layout="npz", note="WiFi CSI, 90 x 250 steps"),
    "sp_sw_har": DatasetInfo(
        "", "features", "label", (1, 100, 6), 5, "cnn1d", owner="user", note="phone and watch, 100 steps x 6 sensors; 23 people"
    ),
    "wiar_height": DatasetInfo(
        "", "features", "label", (1, 64, 90), 16, "cnn1d", owner="height_cm", note="WiFi CSI, 64 steps x 90 streams; 3 heights"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class DataLocation:
    """Where a data set is, before anything is read: files by split (parquet, npz, CSV or pictures), or without any
    the Hub's `hub`.

    Of what a program has in memory, `splits` are those of a datasets.DatasetDict, and `decode` makes the tensors.
    """

    name: str
    identity: Any  # JSON-able; changes when the files do
    known: DatasetInfo | None = None
    files: dict[str, list[Path]] | None = None
    hub: str = ""
    splits: dict[str, Any] | None = None
    decode: Callable[[DataOptions, Callable[[str], None]], Any] | None = None


LOCAL: dict[str, DataLocation] = {}  # what programs have handed over, by name


def find_dataset(dataset: str) -> DataLocation:
    """Where `dataset` is: a known short name (in $HETFL_DATA before the Hub), a folder, a file or a Hub id.

    Raises UsageError where it is none of these, or a folder without files that can be read.
    """
    if dataset in LOCAL:
        return LOCAL[dataset]
    if dataset.startswith(GIVEN):
        raise UsageError(f"the data '{dataset}' were given as an object, which is not here: give them again, as data=…")
    name = next((short for short, known in KNOWN.items() if dataset == known.hub != ""), dataset)
    known = KNOWN.get(name)
    if name == "digits":
        return _locate_files(name, Path(__file__).parent / "digits", known)
    if name == "dialects":
        return DataLocation(name, "built in", known, decode=make_dialects)
    folder = os.environ.get("HETFL_DATA")
    if folder and re.fullmatch(r"\w[\w.-]*", name) and os.path.isdir(os.path.join(folder, name)):
        return _locate_files(name, Path(folder) / name, known)
    if known and not known.hub:
        raise UsageError(
            f"data set '{name}' cannot be downloaded: give its folder with --dataset PATH/{name}, or put it into $HETFL_DATA; "
            f"it holds train.{known.layout} and test.{known.layout} as docs/data.md says"
        )
    if known:
        return DataLocation(name, f"hub:{known.hub}", known, hub=known.hub)
    return _locate_unlisted(dataset)


def _locate_unlisted(dataset: str) -> DataLocation:
    """Where a data set without a short name is. Raises UsageError."""
    path = Path(os.path.expanduser(dataset))
    if dataset and os.path.exists(path):
        name = path.resolve().stem if os.path.isfile(path) else path.resolve().name
        return _locate_files(name, path, KNOWN.get(name))
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", dataset) and not dataset.endswith(FORMATS):
        return DataLocation(dataset, f"hub:{dataset}", hub=dataset)
    if re.search(r"[/\\]|\.(parquet|npz|csv)$|^[.~]", dataset):
        raise UsageError(f"no folder or file '{dataset}' for --dataset{nearest(path.name, KNOWN)}")
    raise unknown("data set", dataset, KNOWN)


PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

FORMATS = (".parquet", ".npz", ".csv")


def _locate_files(name: str, path: Path, known: DatasetInfo | None) -> DataLocation:
    """The parquet files at `path`, a file or a folder, else its npz files, CSV files or pictures, by split. Raises UsageError."""
    if path.is_file() and path.suffix not in FORMATS:
        raise UsageError(f"'{path}' is neither a parquet, an npz nor a CSV file: --dataset takes one of these or a folder of them")
    found = [path] if path.is_file() else next((f for end in FORMATS if (f := sorted(path.rglob(f"*{end}")))), [])
    if not found:  # pictures lie in a folder for each class
        found = sorted(file for file in path.glob("*/**/*") if file.suffix.lower() in PICTURES)
    if not found:
        raise UsageError(
            f"folder '{path}' holds no parquet, npz or CSV file (it needs train*.parquet or train.npz, and should have test* too) "
            "and no folders of pictures, one for each class"
        )
    files = _group_by_split(path, found)
    if "train" not in files:
        raise UsageError(f"'{path}' has no train split: name its files train*{found[0].suffix} and test*{found[0].suffix}")
    states = [(str(file.relative_to(path)), (state := file.stat()).st_size, state.st_mtime_ns) for file in found]
    return DataLocation(name, [str(path.resolve()), states], known, files)


def _group_by_split(path: Path, found: list[Path]) -> dict[str, list[Path]]:
    """The files by the split that their names, or else their folders, name; all are train where no name does."""
    files: dict[str, list[Path]] = {}
    for file in found:
        splits = [split for part in reversed(file.relative_to(path).parts) if (split := _find_split(part))]
        files.setdefault(splits[0] if splits else "", []).append(file)
    return {"train": found} if list(files) == [""] else files


def _find_split(name: str) -> str | None:
    """The split that a name has as a word: train of train-00000-of-00001, None of trainer."""
    words = {"train": "training", "test": "testing|eval|evaluation", "validation": "valid|val|dev"}
    for split, others in words.items():
        if re.search(rf"(?<![a-z])({split}|{others})(?![a-z])", name.lower()):
            return split
    return None
