"""What an engine costs: `python benchmarks/engines.py [ENGINE …]` prints for each the seconds from the start of the process to the
first client's answer, and the milliseconds that a round takes for each of its clients beyond the local engine's."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import psutil

JOB: dict[str, Any] = {
    "limit": 400, "clients": 40, "partition": "iid", "own_test": 0.0, "epochs": 1, "local_steps": 1, "batch_size": 4,
    "pretrain_steps": 0, "control": False, "model": "mlp", "model_args": {"hidden": [8, 6]}, "levels": "1",
    "extract": "heterofl", "vmap": "off",
}  # fmt: skip
ROUNDS = 12
ENGINES = ("local", "processes", "ray", "flower-sim")


def measure(engine: str) -> dict[str, float]:
    """{"start": seconds from this process's start to the first answer, "round": median seconds of a round after the first ones}."""
    from hetfl.config import resolve
    from hetfl.rounds.loop import run_round
    from hetfl.rounds.reporting import NoCallback
    from hetfl.runs.experiment import prepare

    made = prepare(resolve({**JOB, "rounds": ROUNDS, "eval_every": ROUNDS + 1, "engine": engine}), NoCallback())
    found: dict[str, float] = {}

    def work() -> None:
        next(iter(made.engine.ask("profile", {0: 1})))
        found["start"] = time.time() - psutil.Process().create_time()
        seconds = []
        for round in range(1, ROUNDS + 1):
            began = time.perf_counter()
            run_round(made.state, round, made.engine)
            seconds.append(time.perf_counter() - began)
        found["round"] = statistics.median(seconds[3:-1])
        assert not any("fault" in row for row in made.state.client_rows)

    made.engine.drive(work)
    made.close()
    return found


def main() -> None:
    """Measures every engine in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engines", nargs="*", choices=[[], *ENGINES], help="local is always among them")
    parser.add_argument("--one", choices=ENGINES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one)))
        return
    base, load = 0.0, os.getloadavg()[0]
    print(f"{JOB['clients']} clients a round, {psutil.cpu_count()} cores, load {load:.1f} at the beginning")
    for engine in dict.fromkeys(["local", *(given.engines or ENGINES)]):
        done = subprocess.run([sys.executable, __file__, "--one", engine], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        each = 1000 * found["round"] / JOB["clients"]
        base = base or each
        more = f"a client {each:6.2f} ms, {each - base:6.2f} more than local"
        print(f"{engine:11} start to first client {found['start']:5.1f} s   {more}", flush=True)


if __name__ == "__main__":
    main()
