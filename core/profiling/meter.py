"""What submodels cost on this machine: measured on the sliced module, once a width."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetfl.config import RunOptions
from hetfl.data.dataset import Examples
from hetfl.models.early_exit import all_exits
from hetfl.profiling import cost as cost_
from hetfl.profiling.cost import Cost
from hetfl.submodel.builder import SubmodelBuilder


class Meter:
    """Costs of the submodels of a run's model, for the profile plugins and for the report."""

    def __init__(self, options: RunOptions, builder: SubmodelBuilder, sample: Examples, classes: int) -> None:
        self._options, self._workshop, self._classes = options, builder, classes
        self._x = sample.x[sample.index[:2]].cpu()
        self._costs: dict[object, Cost] = {}
        self._lock = threading.Lock()

    def cost(self, ratio: float) -> Cost:
        """The cost of the leading `ratio` of every width group."""
        return self.of({name: len(units) for name, units in self._workshop.widths.prefix(ratio).items()})

    def of(self, sizes: Mapping[str, int] | None, model: str | None = None) -> Cost:
        """The cost of a submodel: dense compute, whatever is masked in it."""
        key = (model, tuple((sizes or {}).items()))
        with self._lock:
            if key not in self._costs:
                module = self._workshop.build(dict(sizes) if sizes is not None else None, model)
                with all_exits(module):
                    self._costs[key] = cost_.measure(module, self._x, self._classes, self._options.batch_size, self._options)
        return self._costs[key]

    def seconds(self, data: Examples, ratio: float, repeats: int = 3) -> float:
        """The median seconds of a training step at width `ratio` on examples of `data`, timed here and now."""
        sizes = {name: len(units) for name, units in self._workshop.widths.prefix(ratio).items()}
        model = self._workshop.build(sizes).to(data.x.device)
        rows = data.index[torch.arange(self._options.batch_size) % len(data)]
        return step_seconds(model, data.x[rows], data.y[rows], repeats)


def step_seconds(model: nn.Module, x: Tensor, y: Tensor, repeats: int = 3) -> float:
    """The median seconds of a forward and backward pass in training, after one to warm up."""
    model, times = model.train(), []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        F.cross_entropy(model(x), y).backward()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def free() -> float:
    """Bytes of memory that are free on this machine now."""
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
