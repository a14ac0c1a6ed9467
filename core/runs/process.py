"""A run within somebody else's program: errors in a program's words, and the process's settings as they were."""

from __future__ import annotations

import inspect
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch

from hetfl.config import RunOptions
from hetfl.errors import UsageError

F = TypeVar("F", bound=Callable[..., Any])

Settings = tuple[int, int, dict[str, str]]

one_at_a_time = threading.RLock()


def for_programs(function: F) -> F:
    """`function` with errors that name options as keywords and not as flags; where it takes any option of a run by keyword, editors
    and `help` see all of them in its signature."""

    @wraps(function)
    def called(*args: Any, **given: Any) -> Any:
        try:
            return function(*args, **given)
        except UsageError as error:
            words = re.sub(r"--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", "_"), str(error))
            raise type(error)(words) from error.__cause__

    own = inspect.signature(function)
    if "options" in own.parameters:
        plain = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        fields = {n: f for n, f in RunOptions.model_fields.items() if n not in own.parameters and n != "dataset"}
        more = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=f.default) for n, f in fields.items()]
        called.__signature__ = own.replace(parameters=[*plain, *more])  # type: ignore[attr-defined]
    return called  # type: ignore[return-value]


def settings() -> Settings:
    """What a run sets for the whole process: torch's threads, and for Ray and Flower the log level and the environment."""
    flower = {name: value for name, value in os.environ.items() if name.startswith(("FLWR_", "RAY_"))}
    return torch.get_num_threads(), logging.getLogger("flwr").level, flower


@contextmanager
def own_settings() -> Iterator[None]:
    """Puts the process's settings back when the run has ended. Runs in several threads go one after the other: torch's generator,
    its hooks on all modules and the warnings' filters are the process's too."""
    with one_at_a_time:
        threads, level, flower = settings()
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            logging.getLogger("flwr").setLevel(level)
            for name in settings()[2].keys() - flower.keys():
                del os.environ[name]
            os.environ |= flower
