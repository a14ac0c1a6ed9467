"""A vmap group's training step on tensors that stay where they are, so that a GPU records it once (a CUDA graph) and replays it.

Steps are cached for each (model, clients, learning rate) and worker thread; each worker has a CUDA stream of its own, so that
groups of different shapes run at the same time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hetfl.config import RunOptions
from hetfl.models.state import State
from hetfl.parallel import ThreadCache
from hetfl.training.local import learning_rate
from hetfl.training.stacking import EagerStep, ModelStack

CACHED = 8  # (model, clients, learning rate) that a worker thread keeps

WARM_UP = 3  # steps before a recording, as CUDA graphs ask for

LOCAL = threading.local()

BENCHES: ThreadCache[GraphedSteps] = ThreadCache(8)


class GraphedSteps:
    """A step that looks like EagerStep to its caller: one fixed-size step for each width of a batch, recorded on a GPU.

    Models, optimiser and batches stay in the same tensors from call to call and from round to round.
    """

    in_place = True

    def __init__(self, stack: ModelStack, options: RunOptions, round: int) -> None:
        self.stack, self._step, self._width = stack, EagerStep(stack, options, round, in_place=True), 0
        self._graphs: dict[int, GraphStep] = {}

    def load(self, states: Sequence[State], width: int) -> None:
        """Begins the training of other clients: copies their `states` in and resets the optimiser.

        Batches are padded to `width` rows; 0: each has a step of its own width, for models that must not see padding.
        """
        self._width = width
        with torch.no_grad():
            for name, value in self.stack.values.items():
                for row, state in zip(value, states, strict=True):
                    row.copy_(state[name])
            for tensor in self._optimizer_tensors():
                tensor.zero_()

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """As EagerStep; the losses (clients,) are valid until the next call."""
        width = self._width or x.shape[1]
        if width not in self._graphs:
            self._graphs[width] = GraphStep(self._step, width, x, y)
            if x.is_cuda:
                self._record(self._graphs[width])
        return self._graphs[width](x, y, weights)

    def _record(self, graph: GraphStep) -> None:
        """Records a step; what the warm-up steps did to models and optimiser is undone."""
        values = [*self.stack.values.values()]
        old_values, old_state = [t.detach().clone() for t in values], [t.clone() for t in self._optimizer_tensors()]
        graph.record()
        with torch.no_grad():
            for tensor, old in zip(values, old_values, strict=True):
                tensor.copy_(old)
            for i, tensor in enumerate(self._optimizer_tensors()):
                tensor.copy_(old_state[i]) if old_state else tensor.zero_()

    def _optimizer_tensors(self) -> list[Tensor]:
        """Momentum, moments and step counts."""
        return [t for state in self._step.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


class GraphStep:
    """`step` on fixed input tensors of batches (clients, width); replayed where it has been recorded, else computed."""

    def __init__(self, step: EagerStep, width: int, x: Tensor, y: Tensor) -> None:
        self._step = step
        self._x = x[:, :1].expand(len(x), width, *x.shape[2:]).clone()
        self._y = torch.zeros(len(y), width, dtype=y.dtype, device=y.device)
        self._weights = torch.zeros(len(y), width, device=y.device)
        self._losses = torch.zeros(len(x), device=x.device)
        self._graph: Any = None

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """The clients' losses on a batch of at most `width` rows; a shorter one is padded with weight 0."""
        self._weights.zero_()
        for fixed, value in ((self._x, x), (self._y, y), (self._weights, weights)):
            fixed[:, : value.shape[1]].copy_(value)
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()
        return self._losses

    def _compute(self) -> None:
        self._losses.copy_(self._step(self._x, self._y, self._weights))

    def record(self) -> None:
        """Records the step on this worker's stream."""
        for _ in range(WARM_UP):
            self._compute()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=own_cuda_stream()):
            self._compute()


def own_cuda_stream() -> Any:
    """This worker thread's own CUDA stream."""
    if not hasattr(LOCAL, "stream"):
        LOCAL.stream = torch.cuda.Stream()
    return LOCAL.stream


@contextlib.contextmanager
def use_own_cuda_stream(device: torch.device) -> Iterator[None]:
    """While it lasts, this thread's work on a GPU goes to its own stream, which is waited for at the end; on CPU, nothing."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.stream(own_cuda_stream()):
        yield
    own_cuda_stream().synchronize()


STEPS: ThreadCache[GraphedSteps] = ThreadCache(CACHED)


def cached_steps(model: nn.Module, states: Sequence[State], options: RunOptions, round: int, width: int) -> GraphedSteps:
    """This worker thread's steps for `model` and so many clients, loaded with `states`; see GraphedSteps.load for `width`."""
    key = (model, len(states), learning_rate(options, round))
    steps = STEPS.get(key, lambda: GraphedSteps(ModelStack(model.train(), states), options, round))
    steps.load(states, width)
    return steps
