"""Worker threads that each run one thread of torch, one client or one evaluation per core; and a cache for each thread."""

from __future__ import annotations

import itertools
import os
import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from typing import Any, Generic, TypeVar

import torch

AHEAD = 8  # jobs for each worker that may be under way or done and not yet taken

In = TypeVar("In")

Out = TypeVar("Out")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Job:
    """A job for a worker; `late` once nobody waits for it any more."""

    def __init__(self, job: Callable[[Any], Any], item: Any) -> None:
        self.job, self.item, self.future = job, item, Future[Any]()
        self.began: float | None = None
        self.late = False

    def run(self) -> None:
        self.began = time.monotonic()
        try:
            self.future.set_result(self.job(self.item))
        except BaseException as error:
            self.future.set_exception(error)

    def result(self, limit: float | None) -> Any:
        """What came of it. Raises NotYetError when it takes longer than `limit` seconds from its beginning."""
        if limit is None:
            return self.future.result()
        while True:
            left = limit if self.began is None else self.began + limit - time.monotonic()
            try:
                return self.future.result(max(0.001, left))
            except NotYetError:
                if self.future.done():
                    continue
                if self.began is not None and time.monotonic() - self.began >= limit:
                    self.late = True
                    raise


class Pool:
    """An ordered parallel map. Results never depend on the number of workers, for each job runs on one torch thread."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers, self._closed = workers or cores(), False
        torch.set_num_threads(1)
        self._turns: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        for _ in range(self.workers):
            self._hire()

    def _hire(self) -> None:
        """A worker more. It is a daemon, so that one that never comes back does not keep the program from ending."""
        threading.Thread(target=self._work, name="hetfl", daemon=True).start()

    def _work(self) -> None:
        torch.set_num_threads(1)
        while (turn := self._turns.get()) is not None:
            turn.run()
            if turn.late:
                return  # somebody has been hired in its place

    def _submit(self, job: Callable[[In], Out], item: In) -> Job:
        if self._closed:
            raise RuntimeError("the workers have been sent home")
        turn = Job(job, item)
        self._turns.put(turn)
        return turn

    def map(self, job: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
        """`[job(x) for x in items]`, several at a time; the first exception is raised when all have ended."""
        turns = [self._submit(job, item) for item in items]
        return [turn.future.result() for turn in turns]

    def stream(
        self, job: Callable[[In], Out], items: Sequence[In], cost: Callable[[In], float],
        limit: float | None = None, late: Callable[[In], Out] | None = None,
    ) -> Iterator[Out]:  # fmt: skip
        """`job(x)` for x in items, in their order, each as soon as it and those before it are there.

        Of the next `AHEAD` items for each worker the dearest begin first, so that no worker ends long after the others; no more
        than these are under way or wait to be taken. A job that takes more than `limit` seconds is given up, for `late(x)`.
        """
        ahead = AHEAD * self.workers
        windows = [range(start, min(start + ahead, len(items))) for start in range(0, len(items), ahead)]
        order = iter([i for window in windows for i in sorted(window, key=lambda i: -cost(items[i]))])
        turns = {i: self._submit(job, items[i]) for i in itertools.islice(order, ahead)}
        for i in range(len(items)):
            try:
                done = turns.pop(i).result(limit)
            except NotYetError:
                assert late is not None
                self._hire()
                done = late(items[i])
            yield done
            turns |= {i: self._submit(job, items[i]) for i in itertools.islice(order, 1)}

    def close(self) -> None:
        self._closed = True
        for _ in range(self.workers):
            self._turns.put(None)


class ThreadCache(Generic[Out]):
    """For each thread the `size` values that it used last, by key; what one thread gets, no other does."""

    def __init__(self, size: int) -> None:
        self._size, self._local = size, threading.local()

    def get(self, key: Hashable, make: Callable[[], Out]) -> Out:
        """This thread's value for `key`, from `make` where it has none; the least recently used value goes for a new one."""
        values: dict[Hashable, Out] = self._local.__dict__.setdefault("values", {})
        value = values.pop(key) if key in values else make()
        values[key] = value  # dicts keep the order of insertion: the first is the least recently used
        if len(values) > self._size:
            del values[next(iter(values))]
        return value
