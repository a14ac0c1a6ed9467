"""A cohort's training step in fixed places, so that a GPU records it once (a CUDA graph) and then replays it.

One bench for each (model, clients, learning rate) and worker; each worker has a stream of its own, so that cohorts of different
shapes run beside one another.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hetfl.models.state import State
from hetfl.parallel import ThreadCache

WARM = 3  # steps before a recording, as CUDA graphs ask for

LOCAL = threading.local()

BENCHES: ThreadCache[GraphedSteps] = ThreadCache(8)


class GraphedSteps:
    """A stack of clients and their optimiser, in fixed places, and a step for each width of a batch.

    `stack` answers x (clients, batch, *shape) with logits and has the clients' `values`; `context` surrounds the forward pass,
    `finish` comes between backward and the optimiser.
    """

    def __init__(
        self, stack: Any, optimizer: torch.optim.Optimizer, context: Callable[[], Any], finish: Callable[[], None]
    ) -> None:
        self.stack, self.optimizer, self.context, self.finish = stack, optimizer, context, finish
        self._steps: dict[int, GraphStep] = {}

    def load(self, states: Sequence[State]) -> None:
        """Begins with the tensors of other clients: nothing is left of the ones before."""
        with torch.no_grad():
            for name, value in self.stack.values.items():
                for row, state in zip(value, states, strict=True):
                    row.copy_(state[name])
            for kept in self._kept():
                kept.zero_()

    def _kept(self) -> list[Tensor]:
        """What the optimiser remembers."""
        return [t for held in self.optimizer.state.values() for t in held.values() if isinstance(t, Tensor)]

    def step(self, size: int, x: Tensor, y: Tensor) -> GraphStep:
        """The step for batches of `size`, as wide as x and y or wider; recorded when it is first wanted, on a GPU."""
        if size not in self._steps:
            self._steps[size] = GraphStep(self, size, x, y)
            if x.is_cuda:
                self._recorded(self._steps[size])
        return self._steps[size]

    def _recorded(self, step: GraphStep) -> None:
        """Records a step; what the steps before it did to the tensors is undone."""
        held = [*self.stack.values.values()]
        before, remembered = [t.detach().clone() for t in held], [t.clone() for t in self._kept()]
        step.record()
        with torch.no_grad():
            for tensor, value in zip(held, before, strict=True):
                tensor.copy_(value)
            for i, kept in enumerate(self._kept()):
                kept.copy_(remembered[i]) if remembered else kept.zero_()


class GraphStep:
    """Forward, backward and optimiser of a bench on batches (clients, size)."""

    def __init__(self, bench: GraphedSteps, size: int, x: Tensor, y: Tensor) -> None:
        self._bench = bench
        self._x = x[:, :1].expand(len(x), size, *x.shape[2:]).clone()
        self._y, self._weights = (
            torch.zeros(len(y), size, dtype=y.dtype, device=y.device),
            torch.zeros(len(y), size, device=y.device),
        )
        self.losses = torch.zeros(len(x), device=x.device)
        self._graph: Any = None

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """One step on a batch; the losses of the clients. A batch that is shorter is padded with weight 0."""
        self._weights.zero_()
        for place, value in ((self._x, x), (self._y, y), (self._weights, weights)):
            place[:, : value.shape[1]].copy_(value)
        if self._graph is None:
            self._work()
        else:
            self._graph.replay()
        return self.losses

    def _work(self) -> None:
        bench = self._bench
        for parameter in bench.stack.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        with bench.context():
            each = F.cross_entropy(bench.stack(self._x).flatten(0, 1), self._y.flatten(), reduction="none").view(self._y.shape)
        losses = (each * self._weights).sum(1)
        losses.sum().backward()
        bench.finish()
        bench.optimizer.step()
        self.losses.copy_(losses.detach())

    def record(self) -> None:
        """Records the step on this worker's stream."""
        for _ in range(WARM):
            self._work()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=own_cuda_stream()):
            self._work()


def own_cuda_stream() -> Any:
    """This worker's own CUDA stream."""
    if not hasattr(LOCAL, "stream"):
        LOCAL.stream = torch.cuda.Stream()
    return LOCAL.stream


@contextlib.contextmanager
def run_beside(device: torch.device) -> Iterator[None]:
    """Work of this worker on a GPU goes to a stream of its own; nothing elsewhere."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(own_cuda_stream()):
        yield
    own_cuda_stream().synchronize()


def cached_bench(
    model: nn.Module, key: tuple[object, ...], make: Callable[[], GraphedSteps], states: Sequence[State]
) -> GraphedSteps:
    """This thread's bench for `model` and `key`, from `make` where it has none, loaded with `states`."""
    found = BENCHES.get((model, *key), make)
    found.load(states)
    return found
