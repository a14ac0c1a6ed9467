"""Clients of one shape one by one and as a stacked model, on one thread: milliseconds a client for one local epoch.

`python -m benchmarks.speed.vmap_groups bounds` measures the nets beside which the bounds of --vmap auto for convolutions were set.
"""

from __future__ import annotations

import inspect
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.speed.work import report

Case = tuple[str, dict[str, Any], tuple[int, ...], int, int, int]  # net, its arguments, an input's shape, examples, batch, clients

CASES: tuple[Case, ...] = (
    ("mlp", {"hidden": []}, (1, 28, 28), 32, 32, 64), ("mlp", {"hidden": [32]}, (1, 28, 28), 32, 32, 64),
    ("mlp", {"hidden": [200, 200]}, (1, 28, 28), 64, 32, 64),
    ("fedconv-cnn", {}, (1, 8, 8), 64, 32, 64), ("fedconv-cnn", {}, (1, 28, 28), 64, 32, 64),
)  # fmt: skip

WIDTHS = [[int(ratio * width) for width in (64, 128, 256, 512)] for ratio in (1 / 16, 1 / 8, 1 / 4)]

BOUNDS: tuple[Case, ...] = (
    *(("preresnet18", {"widths": w, "blocks": [1, 1, 1, 2]}, (3, 32, 32), 4 * b, b, 10) for w in WIDTHS for b in (10, 32)),
    *(("cnn", {"widths": w}, (3, 32, 32), 4 * b, b, 10) for w in WIDTHS for b in (10, 32)),
    ("resnet18", {"widths": WIDTHS[1]}, (1, 28, 28), 40, 10, 10), ("cnn1d", {}, (1, 50, 6), 128, 32, 10),
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

    known = {"classes": 10, "channels": shape[0], "size": shape[1] if shape[1] == shape[2] else shape[1:]}
    given = {k: v for k, v in known.items() if k in inspect.signature(models.ZOO[net]).parameters}
    model = to_fast_layout(models.ZOO[net](**given, **args)).train()
    x, y = torch.randn(ROWS, *shape), torch.arange(ROWS) % 10
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

    def together() -> None:
        for start in range(0, clients, vectorized.MOST):
            vectorized.train(model, members[start : start + vectorized.MOST], options, 1)

    count = sum(p.numel() for p in model.parameters())
    return {
        "net": net,
        "size": shape[1],
        "batch": batch,
        "examples": examples,
        "parameters": count,
        **{w.__name__: median(w) / clients for w in (alone, together)},
    }


def median(work: Callable[[], None]) -> float:
    """Milliseconds of the median of five, after one to warm up."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[1:])


def main() -> None:
    torch.set_num_threads(1)
    report(cases=[measure(*case) for case in (BOUNDS if "bounds" in sys.argv else CASES)])


if __name__ == "__main__":
    main()
