"""Where clients run: `local` on threads of this process, `processes` in processes of their own, `ray` on Flower's simulation."""

from __future__ import annotations

from pathlib import Path

from hetfl.core.apps import Desk, Means, Site, client_app
from hetfl.core.config import RunOptions
from hetfl.core.crew import Crew
from hetfl.core.grid import LocalGrid
from hetfl.core.pool import Pool
from hetfl.core.processes import Processes
from hetfl.core.ray import RaySimulation
from hetfl.core.remote import RemoteGrid
from hetfl.core.wire import Wire


def desk(options: RunOptions) -> Means:
    """How payloads travel: by reference within a process, else as records."""
    return Desk() if options.engine == "local" else Wire()


def grid(site: Site, pool: Pool, cohort: int, resolved: str, home: Path) -> LocalGrid | RemoteGrid:
    """The grid of a run; `resolved` is its config.toml, from which other processes build the same, `home` their clients' folder."""
    options, clients = site.options, len(site.federation.clients)
    if options.engine == "local":
        return LocalGrid(Crew(client_app(site), site, pool.workers, cohort), clients, pool, options.timeout)
    if options.engine == "processes":
        return LocalGrid(Processes(resolved, options.timeout), clients, pool)
    return RaySimulation(clients, options, resolved, home)
