"""hfl is imported where there is no POSIX: nothing of it stands at a module's top level."""

from __future__ import annotations

import subprocess
import sys

from helpers.paths import ROOT

# Other people's packages choose by the platform, so they are imported before Linux is made to look like Windows.
CODE = """
import importlib, os, signal, sys
import asyncio, datasets, psutil, filelock, flwr.app, flwr.clientapp.mod, flwr.serverapp, flwr_datasets, matplotlib.figure, pandas
import PIL.Image, pluggy, ray.util.scheduling_strategies, rich.live, safetensors.torch, torch.func, trustme, typer
for name in ("fcntl", "grp", "pwd", "resource", "termios", "tty"):
    sys.modules[name] = None
for name in ("getuid", "killpg", "sched_getaffinity", "setsid", "sysconf"):
    delattr(os, name)
del signal.SIGKILL
for name in sys.argv[1:]:
    importlib.import_module(name)
    print(name)
"""


def modules():
    """Every module of hetfl, by its files."""
    for folder, package in (("core", "hetfl"), ("cli", "hetfl.cli"), ("plugins", "hetfl.plugins")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")])


def test_every_module_is_imported_without_posix():
    names = list(modules())
    done = subprocess.run([sys.executable, "-c", CODE, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == names
    assert len(names) > 100
