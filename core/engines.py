"""Where clients run: `local` on threads of this process, `processes` in processes of their own, `ray` on Flower's simulation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flwr.serverapp import Grid

from hetfl.core.apps import Desk, Means, Site, client_app
from hetfl.core.config import RunOptions
from hetfl.core.crew import Crew
from hetfl.core.errors import UsageError
from hetfl.core.grid import LocalGrid
from hetfl.core.pool import Pool
from hetfl.core.processes import Processes
from hetfl.core.ray import RaySimulation
from hetfl.core.remote import RemoteGrid
from hetfl.core.wire import Wire


def desk(options: RunOptions) -> Means:
    """How payloads travel: by reference within a process, else as records."""
    return Desk() if options.engine == "local" else Wire()


@dataclass(frozen=True)
class Surroundings:
    """The folder for the memory of clients in other processes, and the grid of the federation that a deployed run is given."""

    home: Path
    grid: Grid | None = None


def grid(site: Site, pool: Pool, cohort: int, resolved: str, where: Surroundings) -> LocalGrid | RemoteGrid:
    """The grid of a run; `resolved` is its config.toml, from which other processes build the same."""
    options, clients = site.options, len(site.federation.clients)
    if options.engine == "local":
        return LocalGrid(Crew(client_app(site), site, pool.workers, cohort), clients, pool, options.timeout)
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
