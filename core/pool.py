"""Worker threads that each run one thread of torch: one client or one evaluation per core."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

In = TypeVar("In")
Out = TypeVar("Out")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Pool:
    """An ordered parallel map. Results never depend on the number of workers, for each job runs on one torch thread."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or cores()
        torch.set_num_threads(1)
        self._threads = ThreadPoolExecutor(self.workers, "hetfl", initializer=torch.set_num_threads, initargs=(1,))

    def map(self, job: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
        """`[job(x) for x in items]`, several at a time; the first exception is raised when all have ended."""
        futures = [self._threads.submit(job, item) for item in items]
        return [future.result() for future in futures]

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
