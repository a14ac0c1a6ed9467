"""hfl, or a program of Python, in a pseudo-terminal of its own, stopped when it has said something."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import sys
import time
from dataclasses import dataclass

from helpers.paths import ROOT


@dataclass
class Ended:
    """How a command ended: `code` is negative where a signal ended it; `seconds` since it was stopped."""

    code: int
    seconds: float
    said: str


def stop_hfl(words, when, how="^C", delay=0.2, limit=200.0):
    """Runs hfl; once its output matches `when`, sends Ctrl-C through the terminal, or the signal `how`."""
    return stop_python(["-m", "hetfl.cli.main", *map(str, words)], when, how, delay, limit)


def stop_python(words, when, how="^C", delay=0.2, limit=200.0):
    """Runs Python with `words`, and stops it so."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        env = {**os.environ, "COLUMNS": "160", "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), *filter(None, [env.get("PYTHONPATH")])])
        os.execve(sys.executable, [sys.executable, *words], env)
    said, began, stopped = "", time.monotonic(), None
    while time.monotonic() < began + limit:
        if select.select([terminal], [], [], 0.05)[0]:
            data = b""
            with contextlib.suppress(OSError):  # Linux says so that the other end is closed
                data = os.read(terminal, 1 << 16)
            if not data:
                break
            said += re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode(errors="replace"))
        if stopped is None and re.search(when, said):
            time.sleep(delay)
            stopped = time.monotonic()
            if how == "^C":
                os.write(terminal, b"\x03")
            else:
                os.kill(pid, getattr(signal, how))
    else:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    return Ended(code, time.monotonic() - (stopped or began), said)
