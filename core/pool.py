"""Worker threads that each run one thread of torch: one client or one evaluation per core."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

AHEAD = 8  # jobs for each worker that may be under way or done and not yet taken

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

    def stream(self, job: Callable[[In], Out], items: Sequence[In], cost: Callable[[In], float]) -> Iterator[Out]:
        """`job(x)` for x in items, in their order, each as soon as it and those before it are there.

        Of the next `AHEAD` items for each worker the dearest begin first, so that no worker ends long after the others; no more
        than these are under way or wait to be taken.
        """
        ahead = AHEAD * self.workers
        windows = [range(start, min(start + ahead, len(items))) for start in range(0, len(items), ahead)]
        turns = iter([i for window in windows for i in sorted(window, key=lambda i: -cost(items[i]))])
        futures = {i: self._threads.submit(job, items[i]) for i in itertools.islice(turns, ahead)}
        for i in range(len(items)):
            yield futures.pop(i).result()
            futures |= {i: self._threads.submit(job, items[i]) for i in itertools.islice(turns, 1)}

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
