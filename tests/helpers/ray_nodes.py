"""A Ray cluster of several nodes on this machine, begun by the real `ray start` and ended again; a mark for tests of Ray."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import pytest

RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1", "--disable-usage-stats"]


def begins_ray(test):
    """For a test that begins Ray, whose sockets and files close only when they are collected: here, not in a later test."""
    ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    return ignored(pytest.mark.usefixtures("collected")(test))


class Cluster:
    """A head node at `address`, and more as they are begun: a process each, which has its node's daemons for children."""

    def __init__(self) -> None:
        self._nodes: list[subprocess.Popen[bytes]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._begin("--head", "--port", self.address.partition(":")[2], "--include-dashboard", "false")

    def add_node(self) -> int:
        """One more node; its number, for `kill`."""
        self._begin("--address", self.address)
        return len(self._nodes) - 1

    def _begin(self, *words: str) -> None:
        settings = {**os.environ, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
        node = subprocess.Popen([*RAY, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=settings)
        self._nodes.append(node)
        until = time.monotonic() + 90
        while not any(p.name() == "raylet" for p in children(node.pid)):
            assert node.poll() is None, "ray start has ended"
            assert time.monotonic() < until, "ray start takes too long"
            time.sleep(0.1)

    def kill(self, number: int) -> None:
        """SIGKILL for a node with all that runs on it."""
        node = self._nodes[number]
        for process in [*children(node.pid), psutil.Process(node.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait(10)

    def end(self) -> None:
        for number, node in reversed([*enumerate(self._nodes)]):
            if node.poll() is None:
                self.kill(number)


def children(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


@contextmanager
def cluster() -> Iterator[Cluster]:
    found = Cluster()
    try:
        yield found
    finally:
        found.end()
