"""Clients in processes of their own, for local training whose Python would hold the lock of one process.

Every worker thread has one process, which builds the run's site from its config; a message and the client's context go there, the
reply and the context's state come back. A process that dies takes one client with it and is replaced.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as NotYetError
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from hetfl.engines.faults import DIED, LATE, raised
from hetfl.engines.local import Call


@dataclass(frozen=True, eq=False)
class Job:
    """One message for one client."""

    calls: list[Call]
    cost: float


class Processes:
    """Answers messages in other processes; `config` is the text of the run's resolved config."""

    def __init__(self, config: str, timeout: float | None) -> None:
        self._timeout = timeout
        self._config, self._own, self._all = config, threading.local(), list[ProcessPoolExecutor]()

    def jobs(self, calls: Sequence[Call]) -> list[Job]:
        """A job each, the longest messages (the widest clients) dearest."""
        return [Job([call], float(length(call[0]))) for call in calls]

    def work(self, job: Job) -> list[Message]:
        """The reply; an error where the client raised, its process ended or it took longer than `timeout` and was ended."""
        ((message, context),) = job.calls
        try:
            reply, state = self._process().submit(answer, message, context).result(self._timeout)
        except BrokenProcessPool:
            return [self._lost(message, DIED, "the client's process ended before it answered")]
        except NotYetError:
            return [self._lost(message, LATE, f"it gave no answer within {self._timeout:g} s, and its process was ended")]
        context.state = state
        return [reply]

    def _lost(self, message: Message, code: int, why: str) -> Message:
        """An error for a client without whose process we go on."""
        process: ProcessPoolExecutor | None = getattr(self._own, "process", None)
        if process is not None:
            for one in list((process._processes or {}).values()):
                one.kill()
            process.shutdown(wait=False, cancel_futures=True)
            self._all.remove(process)
            self._own.process = None
        return Message(Error(code, why), reply_to=message)

    def _process(self) -> ProcessPoolExecutor:
        """This thread's process."""
        if getattr(self._own, "process", None) is None:
            made = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin, (self._config, os.getpid()))
            self._own.process = made
            self._all.append(made)
            made.submit(ready).result()  # its beginning is not the first client's time
        process: ProcessPoolExecutor = self._own.process
        return process

    def close(self) -> None:
        for process in self._all:
            process.shutdown(cancel_futures=True)


def length(message: Message) -> int:
    """Bytes of a message's arrays."""
    return sum(len(array.data) for record in message.content.array_records.values() for array in record.values())


APPS: list[ClientApp] = []


def begin(config: str, parent: int) -> None:
    """Builds the site of the run, once a process."""
    threading.Thread(target=follow, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    APPS.append(app(config))


def app(config: str) -> ClientApp:
    """The ClientApp of the run that `config` resolves, its payloads written out."""
    from hetfl.config import resolve
    from hetfl.rounds import setup
    from hetfl.rounds.client import client_app
    from hetfl.rounds.records import RecordCodec
    from hetfl.rounds.reporting import NoCallback

    return client_app(setup.build_setup(resolve(tomllib.loads(config)), NoCallback()).site(RecordCodec()))


def ready() -> None:
    """The site is built when this is called."""


def answer(message: Message, context: Context) -> tuple[Message, RecordDict]:
    from hetfl.engines.flower_internals import identify

    identify(context.node_id)
    try:
        return APPS[0](message, context), context.state
    except BaseException as error:
        return raised(message, error), context.state


def follow(parent: int) -> None:
    """Ends this process when its parent has: nobody else would."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
