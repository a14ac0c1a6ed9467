"""Stubs of Flower's programs and the process that forks them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hetfl.engines.flower import warm

CODE = """
import os, sys, time
from hetfl.engines.flower import warm

def program():
    print(sys.argv, os.environ["GIVEN"], os.getcwd(), os.getpid(), flush=True)
    if "wait" in sys.argv:
        time.sleep(60)
    return 3

setsid = os.setsid
os.setsid = lambda: time.sleep(60) if "slow" in sys.argv[2:] else setsid()
warm.import_everything, warm.load_program = lambda: None, lambda name: program
warm.main(sys.argv[1])
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="stubs are for Linux")


def is_there(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(what):
    until = time.monotonic() + 20
    while not what():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_a_stub_is_the_program_and_neither_outlives_the_other(tmp_path):
    (tmp_path / "flwr").write_text("#!/bin/sh\necho real $1\n")
    (tmp_path / "flwr").chmod(0o755)
    home, env = tmp_path / ("a very long name " * 8), {**os.environ, "GIVEN": "yes"}
    home.mkdir()
    stub = warm.write_stubs(home, tmp_path) / "flwr"
    assert subprocess.run([stub, "x"], capture_output=True, check=True).stdout == b"real x\n", "nobody listens"
    begun = [server := subprocess.Popen([sys.executable, "-c", CODE, str(home)])]
    try:
        wait_for((home / warm.SOCKET).exists)
        time.sleep(0.05)
        done = subprocess.run([stub, "run", "a b"], capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
        assert done.returncode == 3
        assert done.stdout.startswith(f"['flwr', 'run', 'a b'] yes {tmp_path} ")
        begun += [subprocess.Popen([stub, "wait"], stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
        one, two = (int(each.stdout.readline().split()[-1]) for each in begun[1:])
        assert is_there(one)
        begun[1].kill()
        wait_for(lambda: not is_there(one))
        assert is_there(two)
        server.kill()
        wait_for(lambda: not is_there(two))
        assert begun[2].wait(20) == 1
    finally:
        for each in begun:
            each.kill()
            each.communicate()


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("words", [(), ("slow",)])
def test_a_stub_that_is_killed_as_its_child_ends_or_begins_leaves_the_others_alone(tmp_path, words):
    stub = warm.write_stubs(tmp_path, tmp_path) / "flwr"
    begun = [server := subprocess.Popen([sys.executable, "-c", CODE, str(tmp_path), *words])]
    try:
        wait_for((tmp_path / warm.SOCKET).exists)
        time.sleep(0.05)
        quiet = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "GIVEN": "yes"}}
        for count in (1, 2):
            begun.append(subprocess.Popen([stub, "wait"], **quiet))
            wait_for(lambda count=count: len(children(server.pid)) == count)
        first, other = children(server.pid)
        if not words:
            server.send_signal(signal.SIGSTOP)
            os.kill(first, signal.SIGKILL)
            wait_for(lambda: not is_there(first))
        begun[1].kill()
        begun[1].wait()
        server.send_signal(signal.SIGCONT)
        wait_for(lambda: first not in children(server.pid))
        assert words or subprocess.run([stub], check=False, **quiet).returncode == 3
        assert is_there(other)
    finally:
        for each in begun:
            each.kill()
            each.communicate()
