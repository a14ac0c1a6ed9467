"""Memory of a run of 100 clients on a frozen base of 124 million parameters: `python benchmarks/base.py`.

The model is the zoo's `encoder` at RoBERTa-base's sizes with random weights, its attention adapted at four ranks; texts are random.
Measured is the most memory of the run's processes together (PSS: what several of them map counts once) at any time between its
beginning and its end, less that of the same run with a narrow base: what Python, torch and the data take either way. It prints a
line for each engine and type of the base.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.compare import held, pids

VOCAB, WORDS = 50265, 20

SIZES: dict[str, dict[str, int]] = {
    "large": {"width": 768, "layers": 12, "heads": 12, "hidden": 3072},
    "narrow": {"width": 24, "layers": 1, "heads": 12},
}

RUN: dict[str, Any] = {
    "model": "encoder", "tokens": 16, "clients": 100, "partition": "iid", "own_test": 0.25, "extract": "loraranks",
    "levels": "1,0.5,0.25,0.125", "adapter": "lora:rank=8,alpha=16,target=attention", "rounds": 2, "epochs": 1, "batch_size": 2,
    "server_data": 8, "server_batch_size": 2, "pretrain_steps": 2, "eval_batch_size": 8, "workers": 2,
}  # fmt: skip


def write_texts(place: Path) -> None:
    """A folder of random texts in four classes: eight examples a client, and 64 to test."""
    draw = random.Random(0)
    for split, count in (("train", 808), ("test", 64)):
        rows = [f"{' '.join(f'w{draw.randrange(10**6)}' for _ in range(WORDS))},{i % 4}" for i in range(count)]
        (place / f"{split}.csv").write_text("\n".join(["text,label", *rows]) + "\n")


def measure(size: str, **values: Any) -> tuple[float, float]:
    """The most MB that the processes of a run held, and its seconds."""
    with tempfile.TemporaryDirectory() as place:
        write_texts(Path(place))
        vocab = VOCAB if size == "large" else 64
        values = {**RUN, **values, "data": place, "out": f"{place}/run", "vocab": vocab, "model_args": SIZES[size]}
        script, began, most = Path(place) / "program.py", time.perf_counter(), 0
        script.write_text(f"import hetfl\nif __name__ == '__main__':\n    hetfl.run(progress=False, **{values!r})\n")
        words = [sys.executable, "-W", "ignore", str(script)]
        process = subprocess.Popen(words, start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while process.poll() is None:
            most = max(most, sum(held(pid) for pid in pids() if is_of(pid, process.pid)))
            time.sleep(0.1)
        if process.returncode:
            raise SystemExit(f"the run failed: {values}")
        return most / 1e6, time.perf_counter() - began


def is_of(pid: str, session: int) -> bool:
    """Whether a process belongs to `session`."""
    with suppress(OSError):
        return os.getsid(int(pid)) == session
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="local,processes")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the clients in each of two rounds")
    asked = parser.parse_args()
    print("| engine | base | memory, MB | without the base | difference | s |\n|---|---|---|---|---|---|", flush=True)
    more = {"fraction": asked.fraction, "workers": asked.workers}
    for engine in asked.engines.split(","):
        narrow, _ = measure("narrow", engine=engine, **more)
        for dtype in asked.dtypes.split(","):
            large, seconds = measure("large", engine=engine, base_dtype=dtype, **more)
            cells = f"{large:,.0f} | {narrow:,.0f} | {large - narrow:,.0f} | {seconds:.0f}"
            print(f"| `{engine}` | {dtype} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
