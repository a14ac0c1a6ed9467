"""Where clients run: `local` on threads of this process, `processes` in processes of their own."""

from __future__ import annotations

from hetfl.core.apps import Desk, Means, Site, client_app
from hetfl.core.config import RunOptions
from hetfl.core.crew import Crew
from hetfl.core.grid import LocalGrid
from hetfl.core.pool import Pool
from hetfl.core.processes import Processes
from hetfl.core.wire import Wire


def desk(options: RunOptions) -> Means:
    """How payloads travel: by reference within a process, else as records."""
    return Desk() if options.engine == "local" else Wire()


def grid(site: Site, pool: Pool, cohort: int, resolved: str) -> LocalGrid:
    """The grid of a run; `resolved` is its config.toml, from which other processes build the same."""
    clients, timeout = len(site.federation.clients), site.options.timeout
    if site.options.engine == "local":
        return LocalGrid(Crew(client_app(site), site, pool.workers, cohort), clients, pool, timeout)
    return LocalGrid(Processes(resolved, timeout), clients, pool)
