"""What checks put around a run: engines that ask otherwise, plugins that watch or spoil, a watch on the clock."""

from __future__ import annotations

import datetime
import random
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch
from pydantic import PrivateAttr
from torch import Tensor

from hetfl.aggregation.updates import Merged
from hetfl.engines.flower.records import RecordCodec
from hetfl.engines.local import LocalEngine, ThreadWorkers
from hetfl.hooks.base import Plugin
from hetfl.hooks.hookspecs import hookimpl
from hetfl.hooks.loading import load_plugins
from hetfl.hooks.server import Server
from hetfl.hooks.values import Coverage
from hetfl.rounds.client import ClientRuntime
from hetfl.rounds.messages import Answer, ClientState, Content, Engine, Failure, Instruction, Kind
from hetfl.runs.experiment import Experiment
from hetfl.submodel.blocks import cells
from hetfl.training.task import Reply, Task


class Around:
    """An engine that asks another one."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.notices = engine, engine.notices

    def ask(self, kind: Kind, contents: Mapping[int, Content]) -> Iterator[tuple[int, Any]]:
        yield from self.engine.ask(kind, contents)

    def drive(self, work: Callable[[], None]) -> None:
        self.engine.drive(work)

    def client_states(self) -> dict[int, ClientState]:
        return self.engine.client_states()

    def restore_client_states(self, states: Mapping[int, ClientState]) -> None:
        self.engine.restore_client_states(states)

    def close(self) -> None:
        self.engine.close()

    def revert(self, client: int) -> None:
        self.engine.revert(client)


class Backwards(Around):
    """Asks the clients one by one, the last one first."""

    def ask(self, kind: Kind, contents: Mapping[int, Content]) -> Iterator[tuple[int, Any]]:
        for client in sorted(contents, reverse=True):
            yield from self.engine.ask(kind, {client: contents[client]})


class Encoded(Around):
    """What passes between server and clients is written as Flower's records, and read from them."""

    codec = RecordCodec()

    def ask(self, kind: Kind, contents: Mapping[int, Content]) -> Iterator[tuple[int, Any]]:
        arrived = {client: self._through(content) for client, content in contents.items()}
        for client, answer in self.engine.ask(kind, arrived):
            yield client, answer if isinstance(answer, Failure) else self._through(answer)

    def _through(self, content: Content | Answer) -> Any:
        return self.codec.decode(self.codec.encode(content))


def federate(made: Experiment) -> Engine:
    """An engine for the run whose clients are as far from the server as nodes are: their own plugin objects, encoded messages."""
    pack = Encoded.codec.pack
    parts = made.options, made.federation, load_plugins(made.given), made.server.builder, made.state.meter
    workers = ThreadWorkers(ClientRuntime(*parts, pack), made.server.pool.workers)
    return Encoded(LocalEngine(workers, made.state.clients, made.server.pool))


@dataclass(frozen=True, eq=False)
class GroupRuntime(ClientRuntime):
    """Notes why clients of a group did not train as one."""

    faults: list[str] = field(default_factory=list)

    def train_group(
        self, clients: Sequence[int], sent: Sequence[Instruction], kept: Sequence[ClientState]
    ) -> list[Reply]:  # fmt: skip
        try:
            return super().train_group(clients, sent, kept)
        except Exception as error:
            self.faults.append(f"{type(error).__name__}: {error}")
            raise


def group_clients(made: Experiment, faults: list[str]) -> Engine:
    """An engine whose clients train as one where they may; why they did not goes to `faults`."""
    if made.group_size < 2:
        faults.append(" ".join(made.server.notes))
    runtime = GroupRuntime(made.options, made.federation, made.plugins, made.server.builder, made.state.meter, faults=faults)
    return LocalEngine(ThreadWorkers(runtime, made.server.pool.workers, made.group_size), made.state.clients, made.server.pool)


class Witness(Plugin):
    """Notes what of the global model changed where no client's update lay."""

    _moved: list[str] = PrivateAttr(default_factory=list)
    _rounds: list[int] = PrivateAttr(default_factory=list)

    def model_copy(self, **_: Any) -> Witness:
        """The same object, so that what it noted can be read after the run."""
        return self

    @hookimpl
    def finalize(self, server: Server, merged: Merged, covered: Sequence[Coverage], round: int) -> None:
        self._rounds.append(len(covered))
        for name, before in server.state.items():
            if before.is_floating_point() and any(name in c.patches for c in covered):
                untouched = (count_cover(name, before, covered) == 0) & (merged.state[name] != before)
                if bool(untouched.any()):
                    self._moved.append(f"round {round}: {int(untouched.sum())} entries of {name}")


def count_cover(name: str, tensor: Tensor, covered: Sequence[Coverage]) -> Tensor:
    """How much of each entry of the global `tensor` the clients' updates cover, in its shape."""
    found = torch.zeros(tensor.shape)
    for patch in (c.patches[name] for c in covered if name in c.patches):
        found[cells(patch.index, tensor)] += 1.0 if patch.coverage is None else patch.coverage.to(found)
    return found


Fault = Literal["failure", "nan", "shape", "missing", "undeclared", "oversized"]


class Spoil(Plugin):
    """Spoils what client 0 answers in round 2, if there is anything to be spoilt so."""

    fault: Fault
    _done: list[int] = PrivateAttr(default_factory=list)

    def model_copy(self, **_: Any) -> Spoil:
        return self

    @hookimpl(wrapper=True, tryfirst=True)
    def fit(self, task: Task) -> Generator[None, Reply, Reply]:
        reply = yield
        if (task.client, task.round) != (0, 2):
            return reply
        if self.fault == "failure":
            raise RuntimeError("spoilt")
        if self.fault == "undeclared":
            return replace(reply, extras={**reply.extras, "nobody declared this": torch.zeros(1)})
        if self.fault == "oversized":
            self._done.extend([1] if reply.extras else [])
            return replace(reply, extras={n: spoil_extra(t) for n, t in reply.extras.items()})
        spoilt = {n: torch.full_like(t, torch.nan) if t.is_floating_point() else t for n, t in reply.state.items()}
        if self.fault == "shape":
            spoilt = {n: t.flatten()[:-1] for n, t in reply.state.items()}
        return replace(reply, state={} if self.fault == "missing" else spoilt)


def spoil_extra(tensor: Tensor) -> Tensor:
    """An extra of another number type than the one declared, which no declaration admits."""
    return tensor.to(torch.float64 if tensor.dtype != torch.float64 else torch.float32)


@contextmanager
def global_seeds(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's own generators at `seed`; as they were afterwards."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])


CLOCKS = {time.time, time.time_ns, time.monotonic, time.monotonic_ns, time.perf_counter, time.perf_counter_ns, time.process_time,
          time.process_time_ns, time.thread_time, time.thread_time_ns, time.localtime, time.gmtime}  # fmt: skip

DATES = ("now", "utcnow", "today")


@contextmanager
def watched_clock(package: str) -> Iterator[list[str]]:
    """Notes who reads a clock, of the modules in `package`, in this thread and those started within."""
    found: list[str] = []

    def note(frame: FrameType, event: str, what: Any) -> None:
        if event != "c_call" or not str(frame.f_globals.get("__name__", "")).startswith(package):
            return
        owner = getattr(what, "__self__", None)
        date = isinstance(owner, type) and issubclass(owner, datetime.date) and what.__name__ in DATES
        if date or what in CLOCKS:
            found.append(f"{frame.f_code.co_qualname} calls {getattr(what, '__qualname__', what)}")

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
