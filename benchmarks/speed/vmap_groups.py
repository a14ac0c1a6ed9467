"""Clients of one shape one by one and as a stacked model, on one thread: milliseconds a client for one local epoch."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.speed.work import report

CASES: tuple[tuple[str, dict[str, Any], int, int], ...] = (
    ("mlp", {"hidden": []}, 28, 32), ("mlp", {"hidden": [32]}, 28, 32), ("mlp", {"hidden": [200, 200]}, 28, 64),
    ("fedconv-cnn", {}, 8, 64), ("fedconv-cnn", {}, 28, 64),
)  # fmt: skip

CLIENTS, ROWS = 64, 2000


def measure(net: str, args: dict[str, Any], size: int, examples: int) -> dict[str, Any]:
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

    known = {"classes": 10, "channels": 1, "size": size}
    given = {k: v for k, v in known.items() if k in inspect.signature(models.ZOO[net]).parameters}
    model = to_fast_layout(models.ZOO[net](**given, **args)).train()
    x, y, options = torch.randn(ROWS, 1, size, size), torch.arange(ROWS) % 10, resolve({"lr": 0.01, "epochs": 1})
    state = {name: t.clone() for name, t in tensors(model).items()}
    members = [vectorized.Member(i, state, Examples(x, y, torch.randperm(ROWS)[:examples].sort().values)) for i in range(CLIENTS)]

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
        for start in range(0, CLIENTS, vectorized.MOST):
            vectorized.train(model, members[start : start + vectorized.MOST], options, 1)

    count = sum(p.numel() for p in model.parameters())
    return {
        "net": net,
        "size": size,
        "examples": examples,
        "parameters": count,
        **{w.__name__: median(w) for w in (alone, together)},
    }


def median(work: Callable[[], None]) -> float:
    """Milliseconds a client."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - began) / CLIENTS)
    return statistics.median(times[1:])


def main() -> None:
    torch.set_num_threads(1)
    report(cases=[measure(*case) for case in CASES])


if __name__ == "__main__":
    main()
