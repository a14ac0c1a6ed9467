"""What pages show beside a command, and what the command prints: seconds and paths are masked, everything else is as it is."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import torch

MASKS = (
    (r"(?<=\.html \()\d+ kB", "…"),  # it holds seconds
    (r"\b[\d.]+(e-?\d+)?( ?s\b| seconds?\b)", "…\\2"),  # 19.2 s
    (r"(?<=[kMG]B) +[\d.]+$", " …"),  # the column seconds of the table of levels
    (r"(?<=seconds) +[\d.]+$", " …"),  # a round's line
)

CPU = ("AVX512", "2.13")  # instructions and torch of the machine on which the pages' figures were made


def same_bits_expected():
    """Whether this machine computes the bits of the one that made the pages.

    torch picks kernels by the CPU's instructions, and those sum in another order: a run on AVX2 or ARM takes the same steps and
    comes to other last bits, which training spreads to some of the digits shown.
    """
    return torch.backends.cpu.get_cpu_capability() == CPU[0] and torch.__version__.startswith(CPU[1])


def mask(text):
    """The lines of a text without trailing blanks and seconds, and without those that say what a slow machine is at."""
    lines = []
    for line in map(str.rstrip, text.strip().splitlines()):
        if re.fullmatch(r"\w+ …", line):
            continue
        if line.startswith("seconds: "):
            line = "seconds: …"  # phases that took none are not among them
        for pattern, mark in MASKS:
            line = re.sub(pattern, mark, line)
        lines.append(line.rstrip())
    return lines


def without_trained_digits(lines):
    """The lines without accuracies, losses and gains, which other instructions may move."""
    return [re.sub(r" +[+-]?(\d+\.\d% ?|\d\.\d{3}\b|\d+\.\d points)", " …", line).rstrip() for line in lines]


def show(command, cwd, columns=132, **env):
    """What a shell command prints; `hfl` and `python` are those of this environment."""
    words = (
        f'hfl() {{ {shlex.quote(sys.executable)} -m hetfl.cli.main "$@"; }}; python() {{ {shlex.quote(sys.executable)} "$@"; }}; '
    )
    there = {**os.environ, "COLUMNS": str(columns), "TERM": "dumb", **env}
    done = subprocess.run(["bash", "-c", words + command], cwd=cwd, capture_output=True, text=True, env=there)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
