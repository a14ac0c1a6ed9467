"""Ordered worker threads."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.oracles import quick
from hetfl.parallel import AHEAD, Pool


@quick
@given(st.lists(st.floats(0, 9), max_size=60), st.integers(1, 3))
def test_a_stream_keeps_the_order_begins_with_the_dearest_and_never_runs_far_ahead(costs, workers):
    pool, begun, lock, taken, far = Pool(workers), [], threading.Lock(), 0, []

    def job(item):
        with lock:
            begun.append(item)
            far.append(len(begun) - taken)
        return item

    items = list(enumerate(costs))
    found = []
    for item in pool.imap_ordered(job, items, lambda item: item[1]):
        found.append(item)
        with lock:
            taken += 1
    pool.close()
    assert found == items
    assert max(far, default=0) <= AHEAD * workers + 1
    if items and workers == 1:
        assert begun[0][1] == max(cost for _, cost in items[:AHEAD])


def test_a_stream_raises_what_a_job_raised():
    pool = Pool(2)
    with pytest.raises(ZeroDivisionError):
        list(pool.imap_ordered(lambda x: 1 / x, [1, 0, 2], lambda x: 1.0))
    pool.close()


def wait_for_ever(item):
    while True:
        time.sleep(0.001)


def test_jobs_are_given_up_although_a_job_before_them_waits_for_their_thread():
    """Two threads are at jobs 0 and 2 when job 0 is given up; 1 begins once 2 or 3, for which nobody waits yet, is given up."""
    pool = Pool(2)
    found = pool.imap_ordered(wait_for_ever, [4, 1, 3, 2], lambda cost: cost, 0.05, lambda item: -item)
    assert list(found) == [-4, -1, -3, -2]
    pool.close()


def test_a_pool_that_is_closed_interrupts_what_runs_and_drops_what_waits():
    pool, heard, begun = Pool(1), [], threading.Event()

    def job(item):
        begun.set()
        try:
            wait_for_ever(item)
        except KeyboardInterrupt:
            heard.append(item)
            raise

    before = threading.active_count()
    first, second = (pool._submit(job, item) for item in (1, 2))
    assert begun.wait(5)
    pool.close()
    assert heard == [1]
    assert isinstance(first.future.exception(0), KeyboardInterrupt)
    assert second.started is None
    assert threading.active_count() == before - 1


HELD = """
import ctypes, sys, torch
from hetfl.parallel import hold_little_memory
hold_little_memory(int(sys.argv[1]))
kept = [torch.ones(count) + 1 for count in range(24_000, 54_000, 100)]
names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
Info = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in names]})
ask = ctypes.CDLL(None).mallinfo2
ask.restype = Info
print(ask().fordblks)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_beside_a_large_base_tensors_of_a_small_batch_leave_no_holes():
    """300 sums are kept, each a little larger than the one before, and what they are sums of is dropped."""
    held = [int(subprocess.check_output([sys.executable, "-c", HELD, str(base)])) for base in (0, 1 << 28)]
    assert held[1] < 2e6 < 10e6 < held[0]
