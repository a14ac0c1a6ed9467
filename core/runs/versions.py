"""The versions of packages that a run records."""

from __future__ import annotations

from functools import cache
from importlib import metadata

PACKAGES = ("hetfl", "torch", "flwr", "flwr-datasets", "datasets", "pluggy", "pydantic")  # that a run names

BITS = ("hetfl", "torch", "numpy")  # on whose versions bits depend


@cache
def version(package: str) -> str:
    """The version of an installed package; its metadata are read once a process, not at every checkpoint."""
    return metadata.version(package)
