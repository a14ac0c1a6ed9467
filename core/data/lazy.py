"""Libraries that are imported only when data are read."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Iterator
from typing import Any


def import_library(name: str) -> Any:
    """The module `name`, imported when it is first needed: these take seconds, and some warn while they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@contextlib.contextmanager
def mute_output() -> Iterator[None]:
    """While it lasts, warnings and stderr (progress bars) are discarded."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
