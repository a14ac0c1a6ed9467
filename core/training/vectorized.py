"""vmap groups: clients of the same submodel shape train as one stacked model (torch.func.vmap), a step of all of them at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn

from hetfl.config import RunOptions
from hetfl.data.dataset import Examples
from hetfl.models.casting import RECURRENT, is_low
from hetfl.models.frozen import frozen
from hetfl.models.normalization import BATCH_NORM
from hetfl.models.state import State, tensors
from hetfl.rng import stream
from hetfl.submodel.builder import fast_layout
from hetfl.training.cuda_graphs import GraphedSteps, GraphPool
from hetfl.training.local import batch_rows
from hetfl.training.stacking import EagerStep, ModelStack, TaskStack, align_batches, run_steps
from hetfl.training.task import Reply, Task

SMALL = 32_768  # parameters up to which stacking pays on CPU (docs/performance.md)

LARGE = 20_000_000  # … and on a GPU

ENTRIES = 1 << 20  # parameters of a group on CPU, all clients together

MOST = 32  # clients in a group

POSITIONS = 8192  # batch x input positions up to which convolutions are stacked on CPU

PLAIN_SMALL, PLAIN_POSITIONS = 200_000, 10_240  # the same of nets whose fast layout is contiguous


@dataclass(frozen=True, eq=False)
class Member:
    """One client of a vmap group: its id, the tensors that it was sent and its training examples."""

    client: int
    state: State
    train: Examples


@dataclass(frozen=True, eq=False)
class MemberResult:
    """A client's tensors after its training, and the mean loss on its last batch."""

    state: State
    loss: float


def group_size(model: nn.Module, options: RunOptions, shape: tuple[int, ...], draws: bool) -> int:
    """How many clients of `model` on inputs of `shape` (one example) train as one; 1: each by itself. A rule, never a timing.

    `draws`: whether the model draws random numbers in its forward pass; every client draws from its own stream, so each trains
    by itself. So do recurrent models, whose kernels vmap does not know, and those with a base in bfloat16.
    """
    if options.vmap == "off" or draws or is_low(model) or any(isinstance(m, RECURRENT) for m in model.modules()):
        return 1
    count, cpu = sum(p.numel() for p in (*model.parameters(), *frozen(model).values())), torch.device(options.device).type == "cpu"
    if options.vmap == "auto" and not (
        is_worthwhile(model, count, options.batch_size * math.prod(shape[1:])) if cpu else count <= LARGE
    ):
        return 1
    return max(2, min(MOST, ENTRIES // max(count, 1))) if cpu else MOST


def is_worthwhile(model: nn.Module, count: int, positions: int) -> bool:
    """Whether stacking is faster on CPU: for few parameters (`count`), and for convolutions on few `positions` of a batch."""
    if not any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules()):
        return count <= SMALL
    if fast_layout(model) == torch.contiguous_format:
        return count <= PLAIN_SMALL and positions <= PLAIN_POSITIONS
    return count <= SMALL and positions <= POSITIONS


def allows_padding(model: nn.Module) -> bool:
    """Whether clients with different numbers of examples can be one group: batch norms would count the padding."""
    return not any(isinstance(m, BATCH_NORM) for m in model.modules())


def find_stacking_error(model: nn.Module, x: Tensor) -> str | None:
    """Why copies of `model` cannot be computed as one on x (N, *shape), or None where they can; `model` is set to training."""
    try:
        stack = ModelStack(model.train(), [tensors(model)] * 2)
        stack(torch.stack([x, x])).float().logsumexp(-1).sum().backward()
    except Exception as error:
        return " ".join(str(error).split())[:200]
    return None


def train(
    model: nn.Module, members: Sequence[Member], options: RunOptions, round: int, graphs: GraphPool | None = None,
    tasks: Sequence[Task] = (),
) -> list[MemberResult]:  # fmt: skip
    """Local training of all members, each as if by itself up to rounding; the same optimiser steps all of them.

    It is plain, or with `tasks`, one for each member, as plugins have made them. With `graphs` every tensor stays where it is, so
    that a GPU can record the step; results are on the model's device.
    """
    kind = members[0].train.kind
    orders = [batch_rows(m.train, options, stream(options.seed, "batches", round, m.client), model) for m in members]
    states = [m.state for m in members]
    widest = max((len(rows) for order in orders for rows in order), default=0) if allows_padding(model) else 0
    step: EagerStep | GraphedSteps
    with contextlib.ExitStack() as borrowed:
        if graphs is None:
            step = EagerStep(TaskStack(tasks) if tasks else ModelStack(model.train(), states), options, round, kind)
        elif tasks:
            widths = [max(len(rows) for rows in batches) for batches in zip_longest(*orders, fillvalue=torch.empty(0))]
            step = borrowed.enter_context(graphs.make(tasks, options, round, widest, widths))
        else:
            step = borrowed.enter_context(graphs.borrow(model, states, options, round, widest, kind))
        draws = [stream(options.seed, "augment", round, m.client) for m in members] if options.augment else []
        ended = run_steps(step, align_batches(orders, mean=True), members[0].train, options, draws)
    return [MemberResult(*ended.get(k, (m.state, 0.0))) for k, m in enumerate(members)]


def fit_together(tasks: Sequence[Task], fit: Callable[[Task], Reply], train: Callable[[], Sequence[Reply]]) -> list[Reply]:
    """The reply of `fit` to each task: every plugin sees its client's task before any is trained, and its reply when all are.

    What trains a task within `fit` begins the next one's `fit`; within the last one's, `train` gives the replies of all.
    """
    trained, found = list[Reply](), dict[int, Reply]()

    def go_on(k: int) -> None:
        if k == len(tasks):
            trained.extend(train())
            return

        def train_task(_: Task) -> Reply:
            go_on(k + 1)
            return trained[k]

        tasks[k].train = train_task
        found[k] = fit(tasks[k])

    go_on(0)
    return [found[k] for k in range(len(tasks))]
