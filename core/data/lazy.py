"""Libraries that are imported only when data are read."""

from __future__ import annotations

import contextlib
import importlib
import io
import threading
import warnings
from collections.abc import Iterator
from typing import Any

_lock = threading.RLock()  # warnings and stderr are the process's: two runs in threads must not restore them crosswise


def import_library(name: str) -> Any:
    """The module `name`, imported when it is first needed: these take seconds, and some warn while they are imported."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


@contextlib.contextmanager
def mute_output() -> Iterator[None]:
    """While it lasts, warnings, stderr and progress bars are discarded; the libraries' settings are as they were afterwards."""
    datasets = import_library("datasets")
    with _lock, warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        verbosity, silent = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
        try:
            datasets.disable_progress_bars()
            datasets.logging.set_verbosity_error()
            yield
        finally:
            datasets.logging.set_verbosity(verbosity)
            if not silent:
                datasets.enable_progress_bars()
