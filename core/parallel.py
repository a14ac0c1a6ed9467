"""Worker threads that each run one thread of torch, one client or one evaluation per core."""

from __future__ import annotations

import itertools
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

AHEAD = 8  # jobs for each worker that may be running, or finished and not yet consumed

In = TypeVar("In")

Out = TypeVar("Out")


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_interrupts_off() -> None:
    """Has this thread, and the processes begun in it, get no SIGINT: Ctrl-C is the main thread's, which ends the others."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


@contextmanager
def hold_interrupts() -> Iterator[None]:
    """Has this thread, and the threads and processes begun in it, get no SIGINT meanwhile; one that comes waits for the end."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent() -> None:
    """Has this process end soon after the one that began it, however that ended: nobody else would end it."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


class Job:
    """One call of `function` on `item`; `late` once its caller has given up waiting for the result."""

    def __init__(self, function: Callable[[Any], Any], item: Any) -> None:
        self.function, self.item, self.future = function, item, Future[Any]()
        self.started: float | None = None  # time.monotonic()
        self.late = False

    def run(self) -> None:
        self.started = time.monotonic()
        try:
            self.future.set_result(self.function(self.item))
        except BaseException as error:
            self.future.set_exception(error)

    def result(self, limit: float | None) -> Any:
        """The result. Raises NotYetError when the job takes longer than `limit` seconds from its start; waiting in the queue does
        not count."""
        if limit is None:
            return self.future.result()
        while True:
            left = limit if self.started is None else self.started + limit - time.monotonic()
            try:
                return self.future.result(max(0.001, left))
            except NotYetError:
                if self.future.done():
                    continue
                if self.started is not None and time.monotonic() - self.started >= limit:
                    self.late = True
                    raise


class Pool:
    """An ordered parallel map. Results never depend on the number of workers, for each job runs on one torch thread."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers, self._closed = workers or cores(), False
        torch.set_num_threads(1)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        for _ in range(self.workers):
            self._start_thread()

    def _start_thread(self) -> None:
        """Starts one more worker thread: a daemon, so that a job that never ends does not keep the program from ending."""
        threading.Thread(target=self._run_jobs, name="hetfl", daemon=True).start()

    def _run_jobs(self) -> None:
        keep_interrupts_off()
        torch.set_num_threads(1)
        while (job := self._jobs.get()) is not None:
            job.run()
            if job.late:
                return  # a replacement thread was started when the job was given up

    def _submit(self, function: Callable[[In], Out], item: In) -> Job:
        if self._closed:
            raise RuntimeError("the pool is closed")
        job = Job(function, item)
        self._jobs.put(job)
        return job

    def map(self, function: Callable[[In], Out], items: Iterable[In]) -> list[Out]:
        """`[function(x) for x in items]`, several at a time; an exception is raised once the items before it are done."""
        jobs = [self._submit(function, item) for item in items]
        return [job.future.result() for job in jobs]

    def imap_ordered(
        self, function: Callable[[In], Out], items: Sequence[In], cost: Callable[[In], float],
        limit: float | None = None, late: Callable[[In], Out] | None = None,
    ) -> Iterator[Out]:  # fmt: skip
        """Yields `function(x)` for x in `items`, in their order, each as soon as it and those before it are finished.

        Items are started in windows of `AHEAD` times the workers, the most expensive by `cost` first within each window, so that
        no worker ends long after the others; never more than one window is running or waits to be consumed. A job that takes more
        than `limit` seconds is given up: `late(x)` is yielded in its place.
        """
        ahead = AHEAD * self.workers
        windows = [range(start, min(start + ahead, len(items))) for start in range(0, len(items), ahead)]
        order = iter([i for window in windows for i in sorted(window, key=lambda i: -cost(items[i]))])
        jobs = {i: self._submit(function, items[i]) for i in itertools.islice(order, ahead)}
        for i in range(len(items)):
            try:
                result = jobs.pop(i).result(limit)
            except NotYetError:
                assert late is not None
                self._start_thread()
                result = late(items[i])
            yield result
            jobs |= {i: self._submit(function, items[i]) for i in itertools.islice(order, 1)}

    def close(self) -> None:
        """Lets the threads end once the jobs submitted so far are done; further jobs are refused."""
        self._closed = True
        for _ in range(self.workers):
            self._jobs.put(None)
