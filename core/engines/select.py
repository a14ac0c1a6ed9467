"""Where clients run: `local` on threads of this process, `processes` in processes of their own, `ray` on Flower's simulation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flwr.serverapp import Grid

from hetfl.config import RunOptions
from hetfl.engines.local import LocalGrid
from hetfl.engines.processes import Processes
from hetfl.engines.ray import RaySimulation
from hetfl.engines.remote import RemoteGrid
from hetfl.engines.threads import ThreadWorkers
from hetfl.errors import UsageError
from hetfl.parallel import Pool
from hetfl.rounds.client import ClientRuntime, HandOver, Transport, client_app
from hetfl.rounds.records import RecordCodec


def desk(options: RunOptions) -> Transport:
    """How payloads travel: by reference within a process, else as records."""
    return HandOver() if options.engine == "local" else RecordCodec()


@dataclass(frozen=True)
class EngineContext:
    """The folder for the memory of clients in other processes, and the grid of the federation that a deployed run is given."""

    home: Path
    grid: Grid | None = None


def grid(site: ClientRuntime, pool: Pool, vmap_clients: int, resolved: str, where: EngineContext) -> LocalGrid | RemoteGrid:
    """The grid of a run; `resolved` is its config.toml, from which other processes build the same."""
    options, clients = site.options, len(site.federation.clients)
    if options.engine == "local":
        return LocalGrid(ThreadWorkers(client_app(site), site, pool.workers, vmap_clients), clients, pool, options.timeout)
    if options.engine == "processes":
        return LocalGrid(Processes(resolved, options.timeout), clients, pool)
    if options.engine == "flower":
        return deployed(where.grid, clients, options)
    return RaySimulation(clients, options, resolved, where.home)


def deployed(given: Grid | None, clients: int, options: RunOptions) -> RemoteGrid:
    """The grid of a federation's own ServerApp. Raises UsageError where there is none."""
    if given is None:
        raise UsageError("--engine flower is what an exported app runs on: use hfl federate, or hfl export flower and flwr run")
    made = RemoteGrid(clients, options.timeout, options.wait)
    made.attach(given)
    return made
