"""A vmap group's training step on tensors that stay where they are, so that a GPU records it once (a CUDA graph) and replays it.

A run keeps its steps in a pool: whoever trains a group borrows those of its shape, with a CUDA stream of their own, so that groups
of different shapes run at the same time and none is recorded twice for another worker thread.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hetfl.config import RunOptions
from hetfl.data.kinds import TaskKind
from hetfl.models.frozen import frozen
from hetfl.models.state import State
from hetfl.training.local import learning_rate
from hetfl.training.stacking import EagerStep, ModelStack, TaskStack, copy_into
from hetfl.training.task import Task

KEPT = 16  # steps (of a model, a number of clients and a learning rate) that wait in a pool to be used again

WARM_UP = 3  # steps before a recording, as CUDA graphs ask for

WORTHWHILE = 10  # steps of a width for which one is recorded that is not used again

RECORDING = threading.Lock()  # torch records one graph at a time

LOCAL = threading.local()


class GraphedSteps:
    """A step that looks like EagerStep to its caller: one fixed-size step for each width of a batch, recorded on a GPU.

    Models, optimiser and batches stay in the same tensors from call to call. `make_stack` makes the models, on `stream`. With
    `recorded_width` no other width is recorded, for steps that are not used again.
    """

    in_place = True

    def __init__(
        self, make_stack: Callable[[], ModelStack], options: RunOptions, round: int, kind: TaskKind, stream: Any,
        recorded_width: int | None = None,
    ) -> None:  # fmt: skip
        self.stream, self._recorded_width = stream, recorded_width
        with on_stream(self.stream):
            self._step = EagerStep(make_stack(), options, round, kind, in_place=True)
        self.stack, self._width = self._step.stack, 0
        self._graphs: dict[int, GraphStep] = {}

    @property
    def recorded(self) -> int:
        """The number of CUDA graphs that were recorded."""
        return sum(graph.recorded for graph in self._graphs.values())

    def pad(self, width: int) -> None:
        """Pads batches to `width` rows; 0: each has a step of its own width, for models that must not see padding."""
        self._width = width

    def load(self, states: Sequence[State]) -> None:
        """Begins the training of other clients: copies their `states` in and resets the optimiser."""
        with torch.no_grad():
            copy_into(self.stack.values, states)
            for tensor in self._optimizer_tensors():
                tensor.zero_()

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """As EagerStep; the losses (clients,) are valid until the next call."""
        width = self._width or x.shape[1]
        if width not in self._graphs:
            self._graphs[width] = GraphStep(self._step, width, x, y)
            if x.is_cuda and self._recorded_width in (None, width):
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
        self._y = torch.zeros(len(y), width, *y.shape[2:], dtype=y.dtype, device=y.device)
        self._weights = torch.zeros(len(y), width, device=y.device)
        self._losses = torch.zeros(len(x), device=x.device)
        self._graph: Any = None

    @property
    def recorded(self) -> bool:
        return self._graph is not None

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """The clients' losses on a batch of at most `width` rows; a shorter one is padded with weight 0."""
        self._weights.zero_()
        for fixed, value in ((self._x, x), (self._y, y), (self._weights, weights)):
            fixed[:, : value.shape[1]].copy_(value)
        if self._graph is None:
            with RECORDING:
                self._compute()
        else:
            self._graph.replay()
        return self._losses

    def _compute(self) -> None:
        self._losses.copy_(self._step(self._x, self._y, self._weights))

    def record(self) -> None:
        """Records the step on this thread's current stream, while no other thread records or computes a step (RECORDING).

        What else other threads do on the GPU meanwhile is theirs (`thread_local`); by default it would spoil the recording. Steps
        computed beside it, and graph.capture_begin in the place of torch.cuda.graph, were tried together: the same seed then did
        not always give the same bits (docs/gpu.md).
        """
        with RECORDING:
            for _ in range(WARM_UP):
                self._compute()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
                self._compute()
        self._graph = graph


class GraphPool:
    """The steps of a run that nobody uses now, by the shape of what they train; `recorded` counts graphs ever recorded."""

    def __init__(self) -> None:
        self._free: dict[Hashable, list[GraphedSteps]] = {}
        self._lock, self.recorded = threading.Lock(), 0

    @contextlib.contextmanager
    def borrow(
        self, model: nn.Module, states: Sequence[State], options: RunOptions, round: int, width: int, kind: TaskKind
    ) -> Iterator[GraphedSteps]:
        """Steps for `model` and so many clients, loaded with `states`, for this thread alone; see GraphedSteps.pad for `width`.

        Their module is a copy, for `functional_call` writes to it while a step is recorded. Steps that raise are not used again.
        """
        key = (tuple((name, t.shape) for name, t in states[0].items()), len(states), learning_rate(options, round))
        with self._lock:
            kept = self._free.pop(key, [])
            steps = kept.pop() if kept else None
            if kept:
                self._free[key] = kept

        def copy_model() -> ModelStack:
            return ModelStack(copy.deepcopy(model, {id(t): t for t in frozen(model).values()}).train(), states)

        if steps is None:
            device = next(model.parameters()).device
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            steps = GraphedSteps(copy_model, options, round, kind, stream)
        with self._counted(steps):
            steps.pad(width)
            steps.load(states)
            yield steps
        with self._lock:
            self._free.setdefault(key, []).append(steps)
            while sum(map(len, self._free.values())) > KEPT:
                oldest = next(iter(self._free))
                self._free[oldest].pop(0)
                if not self._free[oldest]:
                    del self._free[oldest]

    @contextlib.contextmanager
    def make(
        self, tasks: Sequence[Task], options: RunOptions, round: int, width: int, widths: Sequence[int]
    ) -> Iterator[GraphedSteps]:
        """Steps for these `tasks` alone, on this thread's stream: what plugins made of their forward passes is not used again.

        `widths` are those of all batches to come; the most frequent is recorded, `width` where they are padded to that, if it comes
        WORTHWHILE times.
        """
        often, times = Counter([width or w for w in widths]).most_common(1)[0] if widths else (0, 0)
        stream = own_stream(next(tasks[0].model.parameters()).device)
        recorded = often if times >= WORTHWHILE else 0
        steps = GraphedSteps(lambda: TaskStack(tasks), options, round, tasks[0].kind, stream, recorded)
        with self._counted(steps):
            steps.pad(width)
            yield steps

    @contextlib.contextmanager
    def _counted(self, steps: GraphedSteps) -> Iterator[None]:
        """While it lasts, work goes to the stream of `steps`; what they have recorded then is counted."""
        before = steps.recorded
        with on_stream(steps.stream):
            yield
        with self._lock:
            self.recorded += steps.recorded - before


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[None]:
    """While it lasts, this thread's work on a GPU goes to `stream`, which waits for what is before it and is waited for at the end.

    None: nothing changes.
    """
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()


def own_stream(device: torch.device) -> Any:
    """This thread's own CUDA stream; None on CPU."""
    if device.type != "cuda":
        return None
    if not hasattr(LOCAL, "stream"):
        LOCAL.stream = torch.cuda.Stream(device)
    return LOCAL.stream


def hand_over(tensors: State) -> State:
    """The same tensors, made on a stream that was waited for, for work on the default stream: their memory waits for it too."""
    for tensor in tensors.values():
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.default_stream(tensor.device))
    return tensors
