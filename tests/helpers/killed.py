"""Commands of hfl that are killed: SIGKILL at a random moment, in a process that has imported everything already."""

from __future__ import annotations

import os
import random
import shutil
import time
from multiprocessing import get_context

from hetfl.cli import run
from hetfl.cli.main import main

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["hetfl.runs.runner", "hetfl.data.catalog", "pyarrow.parquet", "hetfl.plugins.methods.fiarse"])


def hfl(out, words):
    """In the other process: a command without its pictures, what it says in the file `out`."""
    with open(out, "ab", buffering=0) as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    run.draw_pictures = lambda folder: None
    main([*map(str, words)])


def killed(words, out, seconds=None):
    """Whether a command was killed after so many seconds (None: never); it had not ended by then."""
    process = FORKS.Process(target=hfl, args=(str(out), words))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return True
    assert process.exitcode == 0, out.read_text()
    return False


def kill_often(place, words, kills, seed):
    """Runs of `words` are killed, `kills` times in all, at random moments of the time that one takes, and resumed until they end.
    Gives the folder of a run that nobody killed, and of each that was."""
    moments, out, whole = random.Random(seed), place / "out.txt", place / "whole"
    began = time.perf_counter()
    killed(["run", "--out", whole, *words], out)
    longest, done, folders = time.perf_counter() - began, 0, []
    while done < kills:
        path = place / f"killed-{len(folders)}"
        command = ["run", "--out", path, *words]
        while killed(command, out, moments.uniform(0.0, longest) if done < kills else None):
            done += 1
            begun = (path / "config.toml").exists() and (path / "config.toml").read_text()
            if path.exists() and not begun:
                shutil.rmtree(path)
            command = ["resume", path] if begun else ["run", "--out", path, *words]
        folders.append(path)
    return whole, folders
