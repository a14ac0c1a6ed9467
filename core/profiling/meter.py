"""What submodels cost: built, and measured on the built module, once for each size."""

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
from hetfl.profiling.cost import Cost, measure_cost
from hetfl.submodel.builder import SubmodelBuilder


class Meter:
    """Costs of the submodels of `builder`, for profile plugins, reports, `hfl inspect` and `hfl profile`.

    Measured are local steps on batches of the first two examples of `sample`, with the batch size and optimiser of `options`.
    """

    def __init__(self, options: RunOptions, builder: SubmodelBuilder, sample: Examples, classes: int) -> None:
        self._options, self.builder, self._classes = options, builder, classes
        self._x = sample.x[sample.index[:2]].cpu()
        self._costs: dict[object, Cost] = {}
        self._lock = threading.Lock()

    def width_cost(self, ratio: float) -> Cost:
        """The cost of the submodel of the leading `ratio` of every width group."""
        return self.cost(self._sizes(ratio))

    def cost(self, sizes: Mapping[str, int] | None, model: str | None = None) -> Cost:
        """The cost of the submodel of `sizes`, or of the client's own architecture `model`, with all its exits.

        Compute and memory are those of dense tensors, whatever is masked in them.
        """
        key = (model, tuple((sizes or {}).items()))
        with self._lock:
            if key not in self._costs:
                module = self.builder.build(dict(sizes) if sizes is not None else None, model)
                with all_exits(module):
                    self._costs[key] = measure_cost(module, self._x, self._classes, self._options.batch_size, self._options)
        return self._costs[key]

    def step_seconds(self, data: Examples, ratio: float, repeats: int = 3) -> float:
        """The median seconds of a training step at width `ratio` on a batch of `data`, timed now, on its device."""
        model = self.builder.build(self._sizes(ratio)).to(data.x.device)
        rows = data.index[torch.arange(self._options.batch_size) % len(data)]
        return time_step(model, data.x[rows], data.y[rows], repeats)

    def _sizes(self, ratio: float) -> dict[str, int]:
        return {name: len(units) for name, units in self.builder.widths.prefix(ratio).items()}


def time_step(model: nn.Module, x: Tensor, y: Tensor, repeats: int = 3) -> float:
    """The median seconds of a forward and backward pass on x (N, *shape), y (N,) in training, after one to warm up."""
    model, times = model.train(), []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        F.cross_entropy(model(x), y).backward()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def free_memory() -> float:
    """Bytes of memory that are free on this machine now."""
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
