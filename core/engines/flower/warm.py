"""Flower's programs without the seconds that they take to begin.

Flower begins a process for every message, which imports Flower and torch anew: 3.5 s of a core before work that often takes a
hundredth of a second. A federation on one machine has stubs of these programs first on PATH. A stub hands its words to one process
that has imported everything (`python -m hetfl.engines.flower.warm HOME`) and waits for the child that this forks; where nobody
listens it begins the program itself. So every message still has a process of its own.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NoReturn, cast

PROGRAMS = ("flower-superexec", "flwr-clientapp", "flwr-serverapp", "flwr")
IMPORTED = ("hetfl.engines.flower.client_app", "hetfl.runs.server_app")

SOCKET = "warm.socket"  # in the federation's folder, and named from within it: such a name may have 108 bytes

PDEATHSIG = 1  # of prctl

STUB = """#!{python} -IS
import json, os, socket, sys

real, here, parent = {real!r}, os.getcwd(), os.getppid()
link = socket.socket(socket.AF_UNIX)
try:
    os.chdir({home!r})
    link.connect({socket!r})
except OSError:
    os.chdir(here)
    os.execv(real, [real, *sys.argv[1:]])
words = json.dumps([os.path.basename(real), sys.argv[1:], here, dict(os.environ)]).encode()
socket.send_fds(link, [len(words).to_bytes(4, "big")], [0, 1, 2])
link.sendall(words)
link.settimeout(0.2)
while os.getppid() == parent:  # whoever is left alone ends, and its child with it
    try:
        sys.exit(int.from_bytes(link.recv(1) or b"\\x01", "big"))
    except TimeoutError:
        pass
"""


def write_stubs(home: Path, programs: Path) -> Path:
    """Writes stubs of the programs in folder `programs`; returns the folder to put on PATH, `programs` where stubs do not work."""
    if sys.platform != "linux" or len(sys.executable) > 120 or " " in sys.executable:  # what a #! line takes
        return programs
    folder = home / "bin"
    folder.mkdir(exist_ok=True)
    for name in PROGRAMS:
        path = folder / name
        path.write_text(STUB.format(python=sys.executable, real=str(programs / name), home=str(home), socket=SOCKET))
        path.chmod(0o700)
    return folder


@dataclass(frozen=True)
class Request:
    """What a stub asks for: a program with its arguments, folder, environment and standard files."""

    name: str
    arguments: list[str]
    place: str
    environment: dict[str, str]
    files: list[int]


@dataclass(frozen=True)
class Child:
    """A program that runs, and the stub that waits for it."""

    pid: int
    link: socket.socket


def serve(listener: socket.socket) -> Request:
    """Forks a child for each stub that asks, and tells the stub how it ended; a child whose stub is gone is killed.

    Returns in the child alone, with what it is to be.
    """
    watched = selectors.DefaultSelector()
    watched.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in watched.select():
            child: Child | None = key.data
            if child is None:
                if (request := begin_child(watched, listener.accept()[0])) is not None:
                    return request
            elif key.fileobj is child.link:
                kill_child(watched, child)
            else:
                tell_end(watched, key.fd, child)


def begin_child(watched: selectors.BaseSelector, link: socket.socket) -> Request | None:
    """Forks a child for the stub at the other end of `link`, and watches both.

    Returns in the child what it is to be; here None, as it does where the stub does not say what it wants.
    """
    try:
        request = read_request(link)
    except (OSError, ValueError):
        link.close()
        return None
    if (pid := os.fork()) == 0:
        for held in (link, *(child.link for key in watched.get_map().values() if (child := key.data))):
            held.close()
        watched.close()
        return request
    for file in request.files:
        os.close(file)
    child = Child(pid, link)
    watched.register(link, selectors.EVENT_READ, child)
    watched.register(os.pidfd_open(pid), selectors.EVENT_READ, child)
    return None


def kill_child(watched: selectors.BaseSelector, child: Child) -> None:
    """Kills a child whose stub has ended, unless it has just ended too, and that was looked at first."""
    if child.link.fileno() < 0:
        return
    watched.unregister(child.link)
    for kill in (os.killpg, os.kill):  # it has no group of its own in its first moments
        with suppress(ProcessLookupError):
            kill(child.pid, signal.SIGKILL)


def tell_end(watched: selectors.BaseSelector, process: int, child: Child) -> None:
    """Tells the stub of a child that has ended, `process` being its pidfd, with which code."""
    watched.unregister(process)
    os.close(process)
    code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    with suppress(KeyError, ValueError):
        watched.unregister(child.link)
    with suppress(OSError):
        child.link.send(bytes([code if code >= 0 else 128 - code]))
    child.link.close()


def read_request(link: socket.socket) -> Request:
    """What a stub asks for. Raises OSError or ValueError where it does not say so within a few seconds."""
    link.settimeout(5.0)
    size, files, _, _ = socket.recv_fds(link, 4, 3)
    words = b""
    while len(words) < int.from_bytes(size, "big"):
        if not (part := link.recv(1 << 16)):
            raise ValueError("a stub ended within its words")
        words += part
    name, arguments, place, environment = json.loads(words)
    return Request(name, arguments, place, environment, files)


def become(request: Request) -> NoReturn:
    """Is the program that was asked for, to its end; what is imported is not taken down, which would copy it first."""
    os.setsid()
    die_with_parent()
    for number, file in enumerate(request.files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request.place)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.argv = [request.name, *request.arguments]
    try:
        code = load_program(request.name)()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def die_with_parent() -> None:
    """Has Linux end this process when the one that began it ends, however it ends."""
    with suppress(Exception):
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL)


def load_program(name: str) -> Callable[[], Any]:
    """The function of a console script."""
    [found] = entry_points(group="console_scripts", name=name)
    return cast(Callable[[], Any], found.load())


def import_everything() -> None:
    """Imports what the programs import, on first use too: a step of an optimiser has torch import a third of itself."""
    for name in PROGRAMS:
        load_program(name)
    for module in IMPORTED:
        importlib.import_module(module)
    torch = importlib.import_module("torch")
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.SGD([parameter]).step()


def main(home: str) -> None:
    """Listens in the federation's folder `home`; stubs wait until everything is imported."""
    os.chdir(home)
    Path(SOCKET).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(SOCKET)
        os.chmod(SOCKET, 0o600)
        listener.listen(128)
        import_everything()
        gc.collect()
        gc.freeze()  # else each child's first collection would copy what is imported
        request = serve(listener)
    become(request)


if __name__ == "__main__":
    main(sys.argv[1])
