"""Folders of pictures: a folder for each class, with its pictures in it."""

from __future__ import annotations

from pathlib import Path

from hetfl.data.arrow import decode_images
from hetfl.data.cache import Stored
from hetfl.data.catalog import DataLocation
from hetfl.data.columns import Columns, describe_tensors, number_values


def decode_pictures(source: DataLocation) -> Stored:
    """The tensors x (N, C, H, W) uint8, y, and test.x, test.y where there is a test or validation split, with facts.

    A picture's class is the name of its folder. Raises UsageError where pictures differ in size or cannot be decoded.
    """
    files = source.files or {}
    test = next((files[split] for split in ("test", "validation") if split in files), None)
    parts: dict[str, list[Path]] = {"": files["train"]} | ({} if test is None else {"test.": test})
    classes, labels = number_values(source, "folder", [[file.parent.name for file in listed] for listed in parts.values()])
    tensors = {f"{part}y": y for part, y in zip(parts, labels, strict=True)}
    for part, listed in parts.items():
        tensors[f"{part}x"] = decode_images(f"'{source.name}'", [{"bytes": None, "path": str(file)} for file in listed])
    return describe_tensors(source, tensors, classes, Columns("picture", "folder", None), {})
