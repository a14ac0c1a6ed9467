"""Worker threads that each run one thread of torch, one client or one evaluation per core."""

from __future__ import annotations

import atexit
import ctypes
import itertools
import os
import queue
import signal
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch

GRACE = 1.5  # seconds that jobs which are interrupted have to end

POLL = 0.05  # seconds between two looks for jobs that are late

M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3  # of glibc's malloc.h

LARGE_BASE = 1 << 28  # bytes

AHEAD = 8  # jobs for each worker that may be running, or finished and not yet consumed

In = TypeVar("In")

Out = TypeVar("Out")


def cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hold_little_memory(base: int) -> None:
    """Has this process, which holds a base of so many bytes, hold less of what it has freed, where the C library is glibc.

    Threads begun from here on take from one store, in turn, and a tensor of a mebibyte or more goes back to the system at once;
    beside a large base one of 64 kibibytes, as no other tensor of its size fits into the hole that an aligned one leaves. (Layers
    of small nets would take a third longer so.)
    """
    with suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_ARENA_MAX, 1)
        library.mallopt(M_MMAP_THRESHOLD, 1 << 16 if base >= LARGE_BASE else 1 << 20)


def return_free_memory() -> None:
    """Gives the system back what this process has freed, where the C library (glibc's) would keep it."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


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
    """One call of `function` on `item`; `late` once its caller has given up waiting for it."""

    def __init__(self, function: Callable[[Any], Any], item: Any) -> None:
        self.function, self.item, self.future = function, item, Future[Any]()
        self.started: float | None = None  # time.monotonic()
        self.late = False

    def run(self) -> None:
        self.started = time.monotonic()
        try:
            result = self.function(self.item)
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    def overdue(self, limit: float) -> bool:
        """Whether it is running for `limit` seconds or more; waiting in the queue does not count."""
        return self.started is not None and not self.future.done() and time.monotonic() - self.started >= limit


def interrupt(threads: Iterable[threading.Thread]) -> None:
    """Raises KeyboardInterrupt in other threads, as soon as each is at its next step of Python."""
    for thread in threads:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(KeyboardInterrupt))


class Pool:
    """An ordered parallel map. Results never depend on the number of workers, for each job runs on one torch thread."""

    def __init__(self, workers: int | None = None) -> None:
        self.workers, self._closed = workers or cores(), False
        torch.set_num_threads(1)
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._running: dict[threading.Thread, Job] = {}
        self._lock = threading.Lock()  # a thread that has left `_running` is never interrupted
        for _ in range(self.workers):
            self._start_thread()
        _open.add(self)

    def _start_thread(self) -> None:
        """Starts one more worker thread: a daemon, so that a job that never ends does not keep the program from ending."""
        self._threads.append(threading.Thread(target=self._run_jobs, name="hetfl", daemon=True))
        self._threads[-1].start()

    def _run_jobs(self) -> None:
        keep_interrupts_off()
        torch.set_num_threads(1)
        me, late = threading.current_thread(), False
        with suppress(KeyboardInterrupt):  # which `close` raises here
            while not late and (job := self._jobs.get()) is not None:
                self._running[me] = job
                job.run()
                with self._lock:
                    self._running.pop(me, None)
                late = job.late  # a replacement thread was started when the job was given up

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
            if limit is not None:
                self._wait(jobs[i], jobs.values(), limit)
            job = jobs.pop(i)
            yield late(items[i]) if late and job.late else job.future.result()
            jobs |= {i: self._submit(function, items[i]) for i in itertools.islice(order, 1)}

    def _wait(self, job: Job, begun: Collection[Job], limit: float) -> None:
        """Waits until `job` is done or late. Every late one of `begun` is given up, for `job` may wait for its thread."""
        while not job.late and not job.future.done():
            for one in begun:
                if not one.late and one.overdue(limit):
                    one.late = True
                    self._start_thread()
            wait([job.future], min(limit, POLL))

    def close(self) -> None:
        """Ends the threads, and interrupts the jobs that they are at: those of a run that failed or was stopped, and late ones.

        Python would end such a thread at its own end, in the middle of torch or as it lets go of tensors, which aborts the process.
        """
        self._closed = True
        with suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
        for _ in range(self.workers):
            self._jobs.put(None)
        with self._lock:
            interrupted = dict(self._running)
            interrupt(interrupted)
            self._running.clear()
        until = time.monotonic() + GRACE
        late = {thread for thread, job in interrupted.items() if job.late}
        for thread in self._threads:
            if thread not in late:
                thread.join(max(0.0, until - time.monotonic()))
        _open.discard(self)


_open: weakref.WeakSet[Pool] = weakref.WeakSet()


@atexit.register
def close_pools() -> None:
    """Closes the pools that nobody has closed."""
    for pool in list(_open):
        pool.close()
