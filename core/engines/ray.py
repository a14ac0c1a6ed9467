"""Clients on a Ray cluster: actors of our own on every node, each of which builds the run's client runtime once.

What clients keep travels with their calls, so it lies with the server and in its checkpoints: a run goes on on any other cluster.
Data, a model with a frozen base, and a state that several clients are sent, are put into Ray's object store, from which each node
has one copy for all its actors.
"""

from __future__ import annotations

import os
import socket
import sys
import time
import tomllib
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hetfl.config import RunOptions, resolve
from hetfl.engines.local import Call, KeepingEngine
from hetfl.engines.modules import find_own_modules
from hetfl.engines.pickling import Packed, answer_in_bytes, pack, pack_based, read_answer, rest_on, unpack
from hetfl.errors import RunError, UsageError
from hetfl.models.frozen import refuse_other_base
from hetfl.parallel import cores
from hetfl.rounds.client import ClientRuntime
from hetfl.rounds.messages import MOST_TEXT, Answer, Failure, Instruction, Kind
from hetfl.rounds.setup import build_given_setup, build_node_setup
from hetfl.submodel import serialization

CREATION = "creation task"  # in Ray's words where an actor's own __init__ raised; its node may be dead otherwise
LOOK = 1.0  # seconds between two looks at who is late and which nodes are there
SETTINGS = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"}  # Ray sends no statistics of its use

BITS = ("hetfl", "torch")  # packages of which every node must have the server's version


class ClientActor:
    """Answers for any client of a run, one at a time; it is built from the run's resolved config, width groups and data.

    Raises UsageError where the base that its node's --base gives is not the run's.
    """

    def __init__(self, job: Packed) -> None:
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is the node's; nobody writes to it
        config, widths, data, model, base = unpack(job)
        options = resolve(tomllib.loads(config))
        common = options, data.on(options.device), serialization.from_json(widths)
        setup = build_node_setup(*common) if model is None else build_given_setup(*common, unpack(model))
        refuse_other_base(setup.builder.base_hash, base)
        self._runtime = setup.runtime()

    def begun(self) -> dict[str, str]:
        """The versions that it runs with."""
        return {name: version(name) for name in BITS}

    def answer(self, kind: Kind, client: int, call: Packed, state: Packed | None) -> tuple[bytes, bytes]:
        """A client's answer and what it keeps; `state` are the tensors that it is sent where others are sent them too."""
        content, kept = unpack(call)
        if state is not None:
            content = replace(content, state=unpack(state))
        return answer_in_bytes(self._runtime, kind, client, content, kept)


@dataclass(eq=False)
class Worker:
    """An actor on the node `node` of host `host`; it has begun, or answers `call` since `since`, once `waits_for` is there."""

    actor: Any
    node: str
    host: str
    waits_for: Any
    call: Call | None = None
    since: float = 0.0


class RayEngine(KeepingEngine):
    """Actors on all nodes of a cluster, each with a core and its share of a GPU; nodes may join and die.

    Without an address (--ray-address, RAY_ADDRESS) it begins a Ray of its own on this machine and ends it. Raises UsageError where
    no cluster answers.
    """

    def __init__(self, runtime: ClientRuntime, config: str) -> None:
        super().__init__(len(runtime.federation.clients))
        options = runtime.options
        self._options, self._gpus = options, count_gpus(options)
        self._began = connect(options.ray_address, find_own_modules(options), options.workers)
        builder, data = runtime.builder, runtime.federation.on("cpu")
        widths = serialization.to_json(builder.widths)
        self._job = ray.put(pack((config, widths, data, pack_based(builder.model), builder.base_hash)))
        if (model := unpack(ray.get(self._job))[3]) is not None:
            rest_on(builder.model, unpack(model))
        self._class: Any = ray.remote(ClientActor)
        self._workers: list[Worker] = []
        self._answered: list[tuple[Call, Answer]] = []  # and not yet taken by whoever asked
        self._refused: dict[str, str] = {}  # nodes on which no actor could begin, and why
        self._renew()

    def _renew(self) -> None:
        """Gives up actors of dead nodes that do nothing, and begins as many as each node that is there has room for."""
        listed: Any = ray.nodes()  # type: ignore[no-untyped-call]
        nodes = {node["NodeID"]: node for node in listed if node["Alive"]}
        self._workers = [w for w in self._workers if w.node in nodes or w.waits_for is not None]
        room = self._options.workers or sys.maxsize
        for id, node in nodes.items():
            free = self._count_places(node["Resources"]) - sum(w.node == id for w in self._workers)
            for _ in range(min(free, room - len(self._workers)) if id not in self._refused else 0):
                where = NodeAffinitySchedulingStrategy(id, soft=False)
                actor = self._class.options(num_cpus=1, num_gpus=self._gpus, scheduling_strategy=where).remote(self._job)
                self._workers.append(Worker(actor, id, node["NodeManagerHostname"], actor.begun.remote()))

    def _count_places(self, resources: dict[str, float]) -> int:
        """How many actors a node with these resources has room for."""
        places = int(resources.get("CPU", 0))
        return min(places, int(resources.get("GPU", 0) / self._gpus + 1e-9)) if self._gpus else places

    def answers(self, calls: Sequence[Call]) -> Iterator[tuple[Call, Answer]]:
        """Every call with its answer, as they come; a Failure for a client whose actor or node dies, or that is late.

        While the caller has an answer it may ask others, whose actors then answer whichever of the calls they have.
        """
        self._renew()
        mine, waiting, shared, idle_since = {id(call) for call in calls}, deque(calls), share_states(calls), time.monotonic()
        while mine:
            for worker in self._workers:
                if worker.waits_for is None and waiting:
                    self._send(worker, waiting.popleft(), shared)
            known = [w.waits_for for w in self._workers if w.waits_for is not None]
            done = ray.wait(known, timeout=self._patience())[0] if known else []
            for worker in [w for w in self._workers if w.waits_for in done]:
                self._collect(worker)
            self._end_late()
            found = [pair for pair in self._answered if id(pair[0]) in mine]
            self._answered = [pair for pair in self._answered if id(pair[0]) not in mine]
            mine -= {id(call) for call, _ in found}
            yield from found
            if any(w.waits_for is None or w.call for w in self._workers):
                idle_since = time.monotonic()
            elif waiting:
                self._wait_for_nodes(idle_since)

    def _send(self, worker: Worker, call: Call, shared: dict[int, Any]) -> None:
        """Has an actor answer a call."""
        content, state = call.content, None
        if isinstance(content, Instruction) and (state := shared.get(id(content.state))) is not None:
            content = replace(content, state={})
        worker.call, worker.since = call, time.monotonic()
        worker.waits_for = worker.actor.answer.remote(call.kind, call.client, pack((content, call.state)), state)

    def _patience(self) -> float:
        """Seconds until there is to be looked who is late, or which nodes are there."""
        limit, now = self._options.timeout, time.monotonic()
        left = [] if limit is None else [w.since + limit - now for w in self._workers if w.call]
        return max(0.01, min([LOOK, *left]))

    def _collect(self, worker: Worker) -> None:
        """Takes what an actor has answered; one that is dead, or has begun with other versions, is given up."""
        call, found, worker.call, worker.waits_for = worker.call, worker.waits_for, None, None
        try:
            answered = ray.get(found)
        except RayError as error:
            self._give_up(worker)
            if call is not None:
                self._answered.append((call, why_died(error, worker.host)))
            elif CREATION in str(error):
                self._refuse(worker, why_not_begun(error))
            self._renew()
            return
        if call is not None:
            answer = read_answer(answered, call)
            self._answered.append((call, answer))
        elif other := [f"{name} {has}, not {version(name)}" for name, has in answered.items() if has != version(name)]:
            self._give_up(worker)
            self._refuse(worker, f"it has {other[0]}")

    def _refuse(self, worker: Worker, why: str) -> None:
        """Notes once of a node that none of its actors can begin."""
        if worker.node not in self._refused:
            self._refused[worker.node] = why
            self.notices.append(f"the Ray node {worker.host} takes no part: {why}")

    def _give_up(self, worker: Worker) -> None:
        """Ends an actor, whatever it does."""
        self._workers.remove(worker)
        with suppress(RayError):
            ray.kill(worker.actor)

    def _end_late(self) -> None:
        """Gives up the calls that have taken longer than the timeout; their actors are ended and replaced."""
        limit, now = self._options.timeout, time.monotonic()
        late = [(w, w.call) for w in self._workers if limit is not None and w.call and now - w.since >= limit]
        for worker, call in late:
            self._give_up(worker)
            self._answered.append((call, Failure(f"it gave no answer within {limit:g} s, and its actor was ended")))
        if late:
            self._renew()

    def _wait_for_nodes(self, since: float) -> None:
        """Looks again which nodes are there. Raises RunError where for --wait seconds none has taken a client."""
        if self._refused and not self._workers:
            raise RunError(f"no node of the Ray cluster can take clients: {next(iter(self._refused.values()))}")
        if time.monotonic() - since > self._options.wait:
            need = f"a core{f' and {self._gpus:g} GPUs' if self._gpus else ''}"
            raise RunError(f"no node of the Ray cluster had {need} free within {self._options.wait:g} s (--wait)")
        if not self._workers:
            time.sleep(LOOK)
        self._renew()

    def close(self) -> None:
        """Ends the actors, and Ray where it began with this engine."""
        for worker in [*self._workers]:
            self._give_up(worker)
        if self._began:
            ray.shutdown()


def count_gpus(options: RunOptions) -> float:
    """GPUs of an actor. Raises UsageError for options of a GPU that it cannot have."""
    if not options.device.startswith("cuda"):
        if options.client_gpus is not None:
            raise UsageError("--client-gpus needs --device cuda")
        return 0.0
    if ":" in options.device:
        raise UsageError(f"with --engine ray, --device is cuda: Ray deals out the GPUs, '{options.device}' may be another's")
    return 1.0 if options.client_gpus is None else options.client_gpus


def connect(address: str | None, modules: Sequence[Path], cpus: int | None) -> bool:
    """Joins the cluster at `address`, or RAY_ADDRESS, or begins one of `cpus` cores here; whether this is what began it.

    `modules` are sent to every node. Raises UsageError where no cluster answers.
    """
    if ray.is_initialized():
        return False
    os.environ |= {name: value for name, value in SETTINGS.items() if name not in os.environ}
    address = address or os.environ.get("RAY_ADDRESS")
    more: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    if modules:
        more["runtime_env"] = {"py_modules": [str(path) for path in modules]}
    try:
        if address in (None, "local"):
            ray.init("local", num_cpus=cpus or cores(), include_dashboard=False, **more)
        else:
            refuse_deaf(str(address))
            ray.init(address, **more)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        where = "on this machine" if address is None else f"at '{address}'"
        raise UsageError(f"no Ray cluster can be used {where} (--ray-address): {str(error).strip().splitlines()[0]}") from error
    return True


def refuse_deaf(address: str) -> None:
    """Raises OSError at once where nothing listens at HOST:PORT; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if address.startswith("ray://"):
        raise ValueError("a ray:// address is Ray's client; give the HOST:PORT of the head node, from a node of the cluster")
    if address != "auto" and not port.isdigit():
        raise ValueError("it is auto or HOST:PORT")
    if address != "auto":
        socket.create_connection((host, int(port)), timeout=10).close()


def share_states(calls: Iterable[Call]) -> dict[int, Any]:
    """Of the states that several calls send, by their ids, what Ray's object store has them as: once a node."""
    states, several = dict[int, Any](), set[int]()
    for call in calls:
        if isinstance(call.content, Instruction):
            several |= {id(call.content.state)} & states.keys()
            states[id(call.content.state)] = call.content.state
    return {key: ray.put(pack(states[key])) for key in several}


def why_died(error: RayError, host: str) -> Failure:
    """Why a call has no answer."""
    if isinstance(error, RayTaskError):
        return Failure(str(error)[-MOST_TEXT:])
    return Failure(f"its actor on the Ray node {host} ended before it answered")


def why_not_begun(error: RayError) -> str:
    """Why an actor did not begin: the last line of what it raised."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
