"""Ctrl-C, SIGTERM and SIGHUP: the command ends within two seconds, whatever runs, and says how to go on."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from hetfl.cli.console import complain, console

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

GRACE = 1.5  # seconds that what runs has to end by itself

_under_way: list[Callable[[], str]] = []  # what to say of the command that runs, the innermost last

_stopped: list[int] = []  # the signal that came


class Stopped(BaseException):
    """A signal asked the command to end; no error, so that nothing on the way takes it for one."""


@contextmanager
def resumable(sentence: Callable[[], str]) -> Iterator[None]:
    """Whoever stops the command meanwhile is told what `sentence` answers then: what is kept, and how to go on."""
    _under_way.append(sentence)
    yield
    _under_way.remove(sentence)  # not where it was stopped: the sentence is said after that


def tell_resume(path: Path) -> Callable[[], str]:
    """The sentence for a run in the folder `path`."""

    def tell() -> str:
        rounds = max((int(file.stem.removeprefix("round-")) for file in path.glob("checkpoints/round-*.json")), default=0)
        if (path / "summary.json").exists() or not (path / "config.toml").exists():
            return f"stopped; the run in '{path}' had {'ended' if path.exists() else 'not begun'}"
        if not rounds:
            return f"stopped before round 1 was kept; hfl resume {shlex.quote(str(path))} begins the run again"
        return f"stopped; hfl resume {shlex.quote(str(path))} goes on after round {rounds}"

    return tell


def begin(listen: bool) -> None:
    """A command begins. With `listen` signals stop it; one that was ignored (nohup) stays ignored."""
    _under_way.clear()
    if not listen:
        return
    signs = [sign for sign in SIGNALS if signal.getsignal(sign) is not signal.SIG_IGN]
    for sign in signs:
        signal.signal(sign, _unwind)
    heard, told = socket.socketpair()  # signals arrive here too when a library (Ray) has put its own handler in place of ours
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(heard, told, signs), daemon=True).start()


def _unwind(sign: int, frame: FrameType | None) -> None:
    """Ends what the main thread does, once."""
    if sign not in _stopped:
        _stopped.append(sign)
    if len(_stopped) == 1:
        raise Stopped


def _watch(heard: socket.socket, told: socket.socket, signs: Sequence[int]) -> None:
    """Ends the process where the main thread does not within GRACE seconds after a signal, or at once when a second one comes."""
    while (sign := heard.recv(1)[0]) not in signs:
        pass
    if sign not in _stopped:
        _stopped.append(sign)
    heard.settimeout(GRACE)
    with suppress(TimeoutError):
        while heard.recv(1)[0] not in signs:
            pass
    leave()


def was_stopped() -> bool:
    return bool(_stopped)


def code() -> int:
    """128 and the number of the signal, as shells have it."""
    return 128 + _stopped[0]


def farewell() -> str:
    """What is said at the end of a command that was stopped."""
    return _under_way[-1]() if _under_way else "stopped"


def leave() -> NoReturn:
    """Says how to go on and ends the process. Python's own way out would abort in torch where clients are in training."""
    with suppress(OSError, ValueError):  # the terminal may be gone
        console.show_cursor()
        complain(farewell())
    end_now(code())


def end_now(exit_code: int) -> NoReturn:
    """Ends the process without Python's clean-up."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(exit_code)
