"""Flower's simulation on Ray as an engine."""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from hetfl.config import RunOptions
from hetfl.engines.flower.node import build_runtime, make_client_app
from hetfl.engines.flower.remote import FlowerEngine
from hetfl.errors import UsageError
from hetfl.parallel import cores, interrupt


class SimulationEngine(FlowerEngine):
    """Asks clients while `drive` runs; an actor a core. Raises UsageError where Ray is not installed."""

    def __init__(self, clients: int, options: RunOptions, config: str, client_states: Path | None) -> None:
        super().__init__(clients, options.timeout, options.wait)
        if importlib.util.find_spec("ray") is None:
            raise UsageError("--engine flower-sim needs Flower's simulation: pip install 'hetfl[ray]'")
        self._config, self._workers = config, options.workers or cores()
        self._folder = (client_states or Path(tempfile.mkdtemp(prefix="hetfl-"))).absolute()
        if client_states is None:
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def drive(self, work: Callable[[], None]) -> None:
        """Does `work` while the simulation runs; what it raises is raised here."""
        os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        os.environ["RAY_ADDRESS"] = "local"  # Flower would give a cluster that runs here a number of cores, which Ray refuses
        from flwr.simulation import run_simulation

        logging.getLogger("flwr").setLevel(logging.CRITICAL)
        config, folder, failures, server = self._config, self._folder, list[BaseException](), ServerApp()
        threads = list[threading.Thread]()

        @server.main()
        def main(grid: Grid, context: Context) -> None:
            threads.append(threading.current_thread())
            try:
                self.attach(grid)
                work()
            except BaseException as error:
                failures.append(error)

        resources: Any = {
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": self._workers, "include_dashboard": False, "log_to_driver": False},
        }
        app = make_client_app(lambda _: build_runtime(config), lambda _: folder)
        try:
            run_simulation(server, app, self._clients, backend_config=resources)
        except KeyboardInterrupt:  # nobody else ends the run, which would wait for clients that are gone
            interrupt(threads)
            raise
        if failures:
            raise failures[0]
