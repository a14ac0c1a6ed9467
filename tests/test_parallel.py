"""Ordered worker threads."""

from __future__ import annotations

import threading

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
    for item in pool.stream(job, items, lambda item: item[1]):
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
        list(pool.stream(lambda x: 1 / x, [1, 0, 2], lambda x: 1.0))
    pool.close()
