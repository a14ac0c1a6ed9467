"""Clients of one shape one by one and as a stacked model, on one thread: milliseconds a client for one local epoch.

`python -m benchmarks.speed.vmap_groups bounds` measures the nets beside which the bounds of --vmap auto for convolutions were set,
`HETFL_BENCH_DEVICE=cuda python -m …` groups of several sizes on a GPU, each recorded as a CUDA graph (`four streams`: groups of
one on four threads).
"""

from __future__ import annotations

import inspect
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.speed.work import DEVICE, report, wait

Case = tuple[str, dict[str, Any], tuple[int, ...], int, int, int]  # net, its arguments, an input's shape, examples, batch, clients

CASES: tuple[Case, ...] = (
    ("mlp", {"hidden": []}, (1, 28, 28), 32, 32, 64), ("mlp", {"hidden": [32]}, (1, 28, 28), 32, 32, 64),
    ("mlp", {"hidden": [200, 200]}, (1, 28, 28), 64, 32, 64),
    ("fedconv-cnn", {}, (1, 8, 8), 64, 32, 64), ("fedconv-cnn", {}, (1, 28, 28), 64, 32, 64),
)  # fmt: skip

WIDTHS = {by: [width // by for width in (64, 128, 256, 512)] for by in (1, 4, 8, 16)}

SMALL, SPREAD = [WIDTHS[by] for by in (16, 8, 4)], [WIDTHS[by] for by in (1, 4, 16)]

BOUNDS: tuple[Case, ...] = (
    *(("preresnet18", {"widths": w, "blocks": [1, 1, 1, 2]}, (3, 32, 32), 4 * b, b, 10) for w in SMALL for b in (10, 32)),
    *(("cnn", {"widths": w}, (3, 32, 32), 4 * b, b, 10) for w in SMALL for b in (10, 32)),
    ("resnet18", {"widths": WIDTHS[8]}, (1, 28, 28), 40, 10, 10), ("cnn1d", {}, (1, 50, 6), 128, 32, 10),
)  # fmt: skip

ON_GPU: tuple[Case, ...] = (
    *(("resnet18", {"widths": w}, (3, 32, 32), 20 * b, b, c) for w in (WIDTHS[1], WIDTHS[4]) for b, c in ((64, 2), (32, 10))),
    *(("preresnet18", {"widths": w, "blocks": [1, 1, 1, 2]}, (3, 32, 32), 200, 10, 10) for w in SPREAD),
    *(("cnn", {"widths": w}, (1, 28, 28), 300, 10, 10) for w in SPREAD),
    ("fedconv-cnn", {}, (1, 28, 28), 600, 32, 10), ("mlp", {"hidden": [200, 200]}, (1, 28, 28), 600, 32, 10),
)  # fmt: skip

ROWS = 2000


def measure(net: str, args: dict[str, Any], shape: tuple[int, ...], examples: int, batch: int, clients: int) -> dict[str, Any]:
    from hetfl.config import resolve
    from hetfl.data.dataset import Examples
    from hetfl.models import zoo as models
    from hetfl.models.state import copy_state as copied
    from hetfl.models.state import load_state as load
    from hetfl.models.state import tensors
    from hetfl.rng import stream
    from hetfl.submodel.builder import to_fast_layout
    from hetfl.training import local as train
    from hetfl.training import vectorized
    from hetfl.training.cuda_graphs import GraphPool

    known = {"classes": 10, "channels": shape[0], "size": shape[1] if shape[1] == shape[2] else shape[1:]}
    given = {k: v for k, v in known.items() if k in inspect.signature(models.ZOO[net]).parameters}
    model = to_fast_layout(models.ZOO[net](**given, **args)).train().to(DEVICE)
    x, y = torch.randn(ROWS, *shape).to(DEVICE), (torch.arange(ROWS) % 10).to(DEVICE)
    options = resolve({"lr": 0.01, "epochs": 1, "batch_size": batch})
    state = {name: t.clone() for name, t in tensors(model).items()}
    members = [vectorized.Member(i, state, Examples(x, y, torch.randperm(ROWS)[:examples].sort().values)) for i in range(clients)]

    def alone() -> None:
        for member in members:
            load(model, member.state)
            optimizer = train.make_optimizer(model, options, 1)
            for rows in train.batch_rows(member.train, options, stream(0, "batches", 1, member.client), model):
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
                optimizer.step()
            copied(model)

    pool = GraphPool() if DEVICE != "cpu" else None
    most = vectorized.MOST if pool is None else clients

    def together(size: int = most, start: int = 0, stride: int = 1) -> None:
        for first in range(start, clients, size * stride):
            vectorized.train(model, members[first : first + size], options, 1, pool)

    def streams() -> None:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda start: together(1, start, 4), range(4)))

    ways: dict[str, Callable[[], None]] = {"alone": alone, "together": together}
    if pool is not None:
        ways |= {f"groups of {size}": partial(together, size) for size in (1, 2, 5) if size < clients} | {"four streams": streams}
    count = sum(p.numel() for p in model.parameters())
    return {
        "net": net,
        "size": shape[1],
        "batch": batch,
        "examples": examples,
        "clients": clients,
        "parameters": count,
        **{name: round(median(way) / clients, 2) for name, way in ways.items()},
    }


def median(work: Callable[[], None]) -> float:
    """Milliseconds of the median of five, after one to warm up."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        work()
        wait()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def main() -> None:
    torch.set_num_threads(1)
    cases = ON_GPU if DEVICE != "cpu" else BOUNDS if "bounds" in sys.argv else CASES
    found = []
    for case in cases:
        found.append(measure(*case))
        print(found[-1], file=sys.stderr, flush=True)
    report(cases=found)


if __name__ == "__main__":
    main()
