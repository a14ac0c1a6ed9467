"""Averaging 10 ResNet18 submodels (widths 1 to 1/16, two each) beside what memory bandwidth allows for the same bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.speed.work import report
from hetfl.hooks.loading import load_class

RATIOS = (1.0, 0.5, 0.25, 0.125, 0.0625)


def medians(works: dict[str, Callable[[], Any]], repeats: int = 15) -> dict[str, float]:
    """Milliseconds of each work, all in turn, after two turns to warm up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 2):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(found[2:]) for name, found in times.items()}


def main() -> None:
    from hetfl import registry
    from hetfl.aggregation.updates import Update
    from hetfl.config import resolve
    from hetfl.hooks.manager import PluginManager
    from hetfl.hooks.server import Server
    from hetfl.models import zoo as models
    from hetfl.models.state import load_state as load
    from hetfl.models.state import tensors
    from hetfl.parallel import Pool
    from hetfl.submodel.builder import SubmodelBuilder
    from hetfl.submodel.plan import Plan
    from hetfl.submodel.tracing.groups import trace
    from hetfl.submodel.widths import prefix
    from hetfl.submodel.widths import unit_count as count

    torch.set_num_threads(1)
    model = models.ZOO["resnet18"](classes=10, channels=3)
    widths = trace(model, torch.randn(2, 3, 32, 32), verify=False)
    server = Server(resolve({}), SubmodelBuilder(model, widths), tensors(model), 10, None, Pool(1))
    plugins = PluginManager({"aggregate.overlap": load_class(registry.find("aggregate", "overlap"))()})
    generator = torch.Generator().manual_seed(0)

    def some(ratio: float) -> Callable[[int], torch.Tensor]:
        return lambda size: torch.randperm(size, generator=generator)[: count(size, ratio)].sort().values

    works: dict[str, Callable[[], Any]] = {}
    for kind, choose in (("prefix", prefix), ("index", some)):
        plans: list[Plan] = [server.select(choose(ratio)) for ratio in RATIOS for _ in range(2)]
        trained = [{n: t.clone() for n, t in plan.take(server.state).items()} for plan in plans]

        def average(plans: Any = plans, trained: Any = trained) -> None:
            pairs = zip(plans, trained, strict=True)
            plugins.aggregate(server, (Update(i, plan.put(state), 1.0) for i, (plan, state) in enumerate(pairs)), 1)

        modules = [server.builder.module(plan.sizes) for plan in plans]

        def extract(plans: Any = plans, modules: Any = modules) -> None:
            for plan, module in zip(plans, modules, strict=True):
                load(module, plan.take(server.state))

        held = sum(t.numel() * 4 for state in trained for t in state.values())
        whole = sum(t.numel() * 4 for t in server.state.values())
        works |= {f"{kind} average": average, f"{kind} extract": extract}
    a, b = torch.randn(int(held / 4)), torch.randn(int(held / 4))
    times = medians(works | {"copy": lambda: b.copy_(a)})  # a copy reads and writes `held` bytes each
    found: dict[str, Any] = {
        kind: {"average": times[f"{kind} average"], "extract": times[f"{kind} extract"], "MB": held / 1e6}
        for kind in ("prefix", "index")
    }
    floor = times["copy"] * (3 * held + 2 * whole) / (2 * held)
    report(milliseconds=found | {"floor": {"average": floor, "extract": times["copy"], "GB/s": 2 * held / times["copy"] / 1e6}})


if __name__ == "__main__":
    main()
