"""Clients in processes of their own, for local training whose Python would hold the lock of one process.

Every process builds the run's client runtime from its config. A process that dies, or is ended for being late, takes one client
with it and is replaced.
"""

from __future__ import annotations

import io
import os
import pickle
import tomllib
from collections.abc import Sequence
from concurrent.futures import TimeoutError as LateError
from multiprocessing import get_context, resource_tracker
from typing import Any

import torch
from pebble import ProcessExpired, ProcessPool
from torch import Tensor

from hetfl.config import resolve
from hetfl.engines.local import Call, Job
from hetfl.parallel import end_with_parent
from hetfl.rounds.client import ClientRuntime
from hetfl.rounds.messages import Answer, Failure, Instruction, too_long
from hetfl.rounds.reporting import NoCallback
from hetfl.rounds.setup import build_setup


class ProcessWorkers:
    """Answers calls in `workers` other processes; `config` is the text of the run's resolved config."""

    def __init__(self, config: str, workers: int, timeout: float | None) -> None:
        self._timeout = timeout
        resource_tracker.ensure_running()  # of spawn; where a worker thread begins it, that thread hears SIGINT from then on
        self._pool = ProcessPool(workers, context=get_context("spawn"), initializer=begin, initargs=(config, os.getpid()))

    def split(self, calls: Sequence[Call]) -> list[Job]:
        """A job for each call; the widest clients are the dearest."""
        return [Job([call], float(entries(call))) for call in calls]

    def work(self, job: Job) -> list[Answer]:
        """The answer; a Failure where the client raised, its process ended or it took longer than `timeout` and was ended."""
        (call,) = job.calls
        data = to_bytes((call.kind, call.client, call.content, call.state))
        try:
            answered = self._pool.schedule(answer, (data,), timeout=self._timeout).result()
        except LateError:
            return [Failure(f"it gave no answer within {self._timeout:g} s, and its process was ended")]
        except ProcessExpired:
            return [Failure("the client's process ended before it answered")]
        reply, kept = pickle.loads(answered)  # the reply's own bytes, which are read only where they are no more than was asked for
        if (failure := too_long(len(reply), call.content)) is not None:
            return [failure]
        found, call.state = pickle.loads(reply), pickle.loads(kept)
        return [found]

    def close(self) -> None:
        """Ends the processes."""
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()


def entries(call: Call) -> int:
    """Entries of the tensors that a call sends."""
    return sum(t.numel() for t in call.content.state.values()) if isinstance(call.content, Instruction) else 0


class TensorPickler(pickle.Pickler):
    """Pickles a tensor as its own entries alone, whatever storage it is a view of, and without shared memory."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            return torch.from_numpy, (obj.detach().cpu().contiguous().numpy(),)
        return NotImplemented


def to_bytes(value: object) -> bytes:
    """`value` as bytes for another process of this run."""
    buffer = io.BytesIO()
    TensorPickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return buffer.getvalue()


# in the other process

RUNTIME: list[ClientRuntime] = []


def begin(config: str, parent: int) -> None:
    """Builds the client runtime of the run, once a process."""
    if os.getppid() != parent:
        os._exit(1)
    end_with_parent()
    torch.set_num_threads(1)
    RUNTIME.append(build_setup(resolve(tomllib.loads(config)), NoCallback()).runtime())


def answer(data: bytes) -> bytes:
    """What a client answers, and what it keeps."""
    kind, client, content, state = pickle.loads(data)
    found: Answer
    try:
        found = RUNTIME[0].answer(kind, client, content, state)
    except (Exception, SystemExit) as error:
        found = Failure.of(error)
    return pickle.dumps((to_bytes(found), to_bytes(state)))
