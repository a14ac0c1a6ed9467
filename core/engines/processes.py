"""Clients in processes of their own, for local training whose Python would hold the lock of one process.

Every process builds the run's client runtime from its config. A frozen base is in memory once for all of them and the run itself,
which map one file. A process that dies, or is ended for being late, takes one client with it and is replaced.
"""

from __future__ import annotations

import os
import pickle
import tomllib
from collections.abc import Sequence
from concurrent.futures import TimeoutError as LateError
from multiprocessing import get_context, resource_tracker
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from pebble import ProcessExpired, ProcessPool

from hetfl.config import resolve
from hetfl.data import loading as data
from hetfl.engines.local import Call, Job
from hetfl.engines.pickling import (
    Mapped,
    answer_in_bytes,
    map_packed,
    pack_based,
    read_answer,
    rest_on,
    to_bytes,
    unpack,
    write_packed,
)
from hetfl.parallel import end_with_parent
from hetfl.rounds.client import ClientRuntime
from hetfl.rounds.messages import Answer, Failure
from hetfl.rounds.reporting import NoCallback
from hetfl.rounds.setup import build_given_setup, build_setup
from hetfl.submodel.builder import SubmodelBuilder
from hetfl.submodel.widths import Widths


class ProcessWorkers:
    """Answers calls in `workers` other processes; `config` is the text of the run's resolved config, `builder` the run's own."""

    def __init__(self, config: str, builder: SubmodelBuilder, workers: int, timeout: float | None) -> None:
        self.notices: list[str] = []
        self._timeout, self._folder = timeout, TemporaryDirectory(prefix="hetfl-base-")
        given = share_base(builder, Path(self._folder.name) / "model")
        resource_tracker.ensure_running()  # of spawn; where a worker thread begins it, that thread hears SIGINT from then on
        self._pool = ProcessPool(workers, context=get_context("spawn"), initializer=begin, initargs=(config, given, os.getpid()))

    def split(self, calls: Sequence[Call]) -> list[Job]:
        """A job for each call; the widest clients are the dearest."""
        return [Job([call], float(call.entries)) for call in calls]

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
        return [read_answer(pickle.loads(answered), call)]

    def close(self) -> None:
        """Ends the processes."""
        self._pool.stop()  # type: ignore[no-untyped-call]
        self._pool.join()
        self._folder.cleanup()


def share_base(builder: SubmodelBuilder, path: Path) -> tuple[Mapped, Widths] | None:
    """Puts a model with a frozen base into a file, on which its base then rests; None where the others are to build their own."""
    packed = pack_based(builder.model)
    if packed is None:
        return None
    mapped = write_packed(packed, path)
    del packed  # it holds the memory that the base is to leave
    rest_on(builder.model, unpack(map_packed(mapped)))
    return mapped, builder.widths


# in the other process

RUNTIME: list[ClientRuntime] = []


def begin(config: str, given: tuple[Mapped, Widths] | None, parent: int) -> None:
    """Builds the client runtime of the run, once a process."""
    if os.getppid() != parent:
        os._exit(1)
    end_with_parent()
    torch.set_num_threads(1)
    options = resolve(tomllib.loads(config))
    if given is None:
        setup = build_setup(options, NoCallback())
    else:
        setup = build_given_setup(options, data.load(options).on(options.device), given[1], unpack(map_packed(given[0])))
    RUNTIME.append(setup.runtime())


def answer(data: bytes) -> bytes:
    """What a client answers, and what it keeps."""
    return pickle.dumps(answer_in_bytes(RUNTIME[0], *pickle.loads(data)))
