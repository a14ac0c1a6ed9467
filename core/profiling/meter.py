"""What submodels cost: built, and measured on the built module, once for each size."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Mapping

import psutil
import torch
from torch import Tensor, nn

from hetfl.config import RunOptions
from hetfl.data.dataset import Examples
from hetfl.models.early_exit import all_exits
from hetfl.profiling.cost import Cost, MakeOptimizer, measure_cost, use_momentum
from hetfl.submodel.builder import SubmodelBuilder, to_fast_layout

Step = Callable[[Tensor, Tensor], None]  # of training, on a batch x (N, *shape), y (N,)
MakeStep = Callable[[nn.Module], Step]


class Meter:
    """Costs of the submodels of `builder`, for profile plugins, reports, `hfl inspect` and `hfl profile`.

    Measured are local steps of `optimizer` on batches of the first two examples of `sample`, with the batch size of `options`.
    """

    def __init__(
        self, options: RunOptions, builder: SubmodelBuilder, sample: Examples, optimizer: MakeOptimizer = use_momentum
    ) -> None:
        self._options, self.builder, self._optimizer, self._kind = options, builder, optimizer, sample.kind
        self._x, self._y = (t[sample.index[:2]].cpu() for t in (sample.x, sample.y))
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
                    how = self._options.batch_size, self._optimizer, self._kind
                    self._costs[key] = measure_cost(module, self._x, repeat_targets(module, self._y), *how)
        return self._costs[key]

    def step_seconds(self, make_step: MakeStep, data: Examples, ratio: float, repeats: int = 3) -> float:
        """The median seconds of a step that `make_step` makes, at width `ratio` on a batch of `data`, timed now, on its device."""
        model = to_fast_layout(self.builder.build(self._sizes(ratio))).to(data.x.device)
        rows = data.index[torch.arange(self._options.batch_size) % len(data)]
        return time_step(make_step(model), data.x[rows], data.y[rows], repeats)

    def _sizes(self, ratio: float) -> dict[str, int]:
        return {name: len(units) for name, units in self.builder.widths.prefix(ratio).items()}


def repeat_targets(model: nn.Module, y: Tensor) -> Tensor:
    """`y` for the answers of all exits of `model` side by side: classes (N,) as they are, numbers (N, outputs) for each exit."""
    exits = int(model.depth) if getattr(model, "every", False) else 1  # type: ignore[arg-type]
    return y if y.ndim == 1 else y.repeat(1, exits)


def time_step(step: Step, x: Tensor, y: Tensor, repeats: int = 3) -> float:
    """The median seconds of `step` on x (N, *shape), y (N,), after one to warm up; on a GPU it has ended when all its work has."""
    times = []
    for _ in range(repeats + 1):
        wait_for(x.device)
        started = time.perf_counter()
        step(x, y)
        wait_for(x.device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def wait_for(device: torch.device) -> None:
    """Waits until `device` has done all that it was given; a CPU has when it answers."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory() -> float:
    """Bytes of memory that programs on this machine can still have, what the page cache would give up included."""
    return float(psutil.virtual_memory().available)
