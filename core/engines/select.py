"""The engine of a run: on threads of this process, in processes, on a Ray cluster, on Flower's simulation or federation."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hetfl.engines.local import LocalEngine, ThreadWorkers
from hetfl.errors import UsageError
from hetfl.parallel import Pool
from hetfl.rounds.client import ClientRuntime
from hetfl.rounds.messages import Engine

if TYPE_CHECKING:
    from flwr.serverapp import Grid

KEYS = "keys.json"  # in the run folder of a federation: client -> the public key of its node


@dataclass(frozen=True)
class EngineContext:
    """What an engine is given: the folder for the state of clients in other processes (None: one that is removed with the engine),
    a deployed run's Flower grid, and the round that begins."""

    client_states: Path | None = None
    grid: Grid | None = None
    first: int = 1


def make_engine(runtime: ClientRuntime, pool: Pool, group_size: int, config: str, context: EngineContext) -> Engine:
    """The engine that the run's options name; `config` is its resolved config.toml, from which other processes build the same.

    Raises UsageError where what it needs is not there.
    """
    options, clients = runtime.options, len(runtime.federation.clients)
    if options.engine == "local":
        return LocalEngine(ThreadWorkers(runtime, pool.workers, group_size), clients, pool, options.timeout)
    if options.engine == "processes":
        from hetfl.engines.processes import ProcessWorkers

        return LocalEngine(ProcessWorkers(config, runtime.builder, pool.workers, options.timeout), clients, pool)
    if options.engine == "ray":
        if importlib.util.find_spec("ray") is None:
            raise UsageError("--engine ray needs Ray: pip install 'hetfl[ray]'")
        from hetfl.engines.ray import RayEngine

        return RayEngine(runtime, config)
    if options.engine == "flower-sim":
        from hetfl.engines.flower.simulation import SimulationEngine

        return SimulationEngine(clients, options, config, context.client_states)
    if context.grid is None:
        raise UsageError("--engine flower is what an exported app runs on: use hfl federate, or hfl export flower and flwr run")
    from hetfl.engines.flower.remote import FlowerEngine

    keys = {} if context.client_states is None else read_keys(context.client_states.parent / KEYS)
    engine = FlowerEngine(clients, options.timeout, options.wait, keys, context.first, options.merges_real_arrivals)
    engine.attach(context.grid)
    return engine


def read_keys(path: Path) -> dict[int, str]:
    """Whose key each client's node has, of a JSON file such as {"0": "ecdsa-sha2-nistp384 AAAA…"}; empty where there is none.

    Raises UsageError for what is none.
    """
    if not path.exists():
        return {}
    try:
        return {int(client): str(key) for client, key in json.loads(path.read_text()).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"'{path}' is no table of clients and their nodes' public keys: {error}") from error
