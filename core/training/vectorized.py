"""Cohorts: clients of the same submodel shape train as one stacked model (torch.func), a step of all of them at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from hetfl.config import RunOptions
from hetfl.data.dataset import Examples
from hetfl.models.normalization import BATCH_NORM
from hetfl.models.state import State, tensors
from hetfl.rng import stream
from hetfl.training.clipping import clip_gradients
from hetfl.training.cuda_graphs import GraphedSteps, cached_bench, run_beside
from hetfl.training.device import arithmetic
from hetfl.training.evaluation import Score
from hetfl.training.local import batch_rows, optimizer_of

RECURRENT = (nn.RNNBase, nn.RNNCellBase)

SMALL = 32_768  # parameters up to which stacking pays on CPU (docs/performance.md)

LARGE = 20_000_000  # … and on a GPU

ENTRIES = 1 << 20  # parameters of a cohort on CPU, all clients together

MOST = 32  # clients in a cohort

POSITIONS = 4096  # batch x input positions up to which convolutions are stacked on CPU


@dataclass(frozen=True, eq=False)
class Member:
    """One client of a cohort: what it was sent and its examples."""

    client: int
    state: State
    train: Examples


@dataclass(frozen=True, eq=False)
class Trained:
    """What a member's training came to: its tensors and the loss on its last batch."""

    state: State
    loss: float


def group_size(model: nn.Module, options: RunOptions, shape: tuple[int, ...], draws: bool) -> int:
    """How many clients of `model` on inputs of `shape` are to train as one; 1: each by itself. A rule, never a timing."""
    if options.cohorts == "off" or draws or any(isinstance(m, RECURRENT) for m in model.modules()):
        return 1
    count, cpu = sum(p.numel() for p in model.parameters()), torch.device(options.device).type == "cpu"
    if options.cohorts == "auto" and not (
        is_worthwhile(model, count, options.batch_size * math.prod(shape[1:])) if cpu else count <= LARGE
    ):
        return 1
    return max(2, min(MOST, ENTRIES // max(count, 1))) if cpu else MOST


def is_worthwhile(model: nn.Module, count: int, positions: int) -> bool:
    """Whether stacking is faster on CPU: for few parameters, and for convolutions on few positions."""
    convolves = any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())
    return count <= SMALL and (not convolves or positions <= POSITIONS)


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether clients with different numbers of examples can be one cohort: batch norms would count the padding."""
    return not any(isinstance(m, BATCH_NORM) for m in model.modules())


def stackable(model: nn.Module, x: Tensor) -> str | None:
    """Why copies of `model` cannot be computed as one on `x` (N, *shape), or None."""
    try:
        stack = Stack(model.train(), [tensors(model)] * 2, frozen=False)
        F.cross_entropy(stack(torch.stack([x, x])).flatten(0, 1), torch.zeros(2 * len(x), dtype=torch.int64)).backward()
    except Exception as error:
        return " ".join(str(error).split())[:200]
    return None


class Stack:
    """The models of several clients as one: every tensor (clients, *shape)."""

    def __init__(self, model: nn.Module, states: Sequence[State], frozen: bool) -> None:
        device = next(model.parameters()).device
        self.model, self.values = model, {name: t.to(device) for name, t in stacked(states).items()}
        wanted = [] if frozen else [n for n, p in model.named_parameters() if p.requires_grad and n in self.values]
        self.parameters = [self.values[n].requires_grad_() for n in wanted]

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (clients, N, classes) of x (clients, N, *shape)."""
        out: Tensor = torch.func.vmap(self._one)(self.values, x)
        return out

    def _one(self, values: State, x: Tensor) -> Any:
        return torch.func.functional_call(self.model, values, (x,))

    def states(self) -> list[State]:
        """The tensors of each client, as they are now."""
        rows = zip(*(tensor.detach().cpu().unbind(0) for tensor in self.values.values()), strict=True)
        return [dict(zip(self.values, row, strict=True)) for row in rows]


def stacked(states: Sequence[State]) -> State:
    """One tensor for the tensors of all states; equal states are one object."""
    if all(state is states[0] for state in states):
        return {
            n: t.detach().expand(len(states), *t.shape).clone(memory_format=torch.contiguous_format) for n, t in states[0].items()
        }
    return {n: torch.stack([state[n].detach() for state in states]) for n in states[0]}


@dataclass(frozen=True, eq=False)
class Batch:
    """One step's rows of all clients side by side (clients, most); padding has weight 0."""

    rows: Tensor
    weights: Tensor  # 1 for each example, or with `mean` 1 / number of the client's examples
    ending: list[int]  # clients whose last step this is

    def of(self, data: Examples) -> tuple[Tensor, Tensor]:
        """x (clients, most, *shape) and y (clients, most)."""
        flat = self.rows.flatten()
        return data.x[flat].unflatten(0, self.rows.shape), data.y[flat].unflatten(0, self.rows.shape)


def align(orders: Sequence[Sequence[Tensor]], mean: bool) -> Iterator[Batch]:
    """The batches `orders`, for each client the rows of each of its steps, put side by side."""
    none = torch.zeros(0, dtype=torch.int64)
    for step in range(max(map(len, orders))):
        ours = [order[step] if step < len(order) else none for order in orders]
        counts = torch.tensor([len(rows) for rows in ours])
        there = torch.arange(int(counts.max())) < counts[:, None]
        weights = there / counts.clamp(min=1)[:, None] if mean else there.float()
        yield Batch(pad_sequence(ours, True), weights, [k for k, order in enumerate(orders) if len(order) == step + 1])


def train(model: nn.Module, members: Sequence[Member], options: RunOptions, round: int, fixed: bool | None = None) -> list[Trained]:
    """Plain local training of all members, each as if by itself up to rounding; the same optimiser steps all of them.

    With `fixed` (default: on a GPU) every tensor stays in its place, so that the step is recorded once.
    """
    device = next(model.parameters()).device
    given = [batch_rows(m.train, options, stream(options.seed, "batches", round, m.client), model) for m in members]
    states, batches = [m.state for m in members], align(given, mean=True)
    done: dict[int, Trained] = {}
    with run_beside(device):
        step: Loose | Fixed
        if fixed if fixed is not None else device.type == "cuda":
            step = Fixed(model, states, options, round, max(len(rows) for order in given for rows in order))
        else:
            step = Loose(model, states, options, round)
        for batch in batches:
            losses = step(*batch.of(members[0].train), batch.weights.to(device))
            if batch.ending:
                now, last = step.stack.states(), losses.tolist()
                more = step.stays or len(done) + len(batch.ending) < len(members)  # who goes on changes these very tensors
                done |= {k: Trained({n: t.clone() if more else t for n, t in now[k].items()}, last[k]) for k in batch.ending}
    return [done[k] if k in done else Trained(m.state, 0.0) for k, m in enumerate(members)]


class Loose:
    """A step whose batches may have any size."""

    stays = False

    def __init__(self, model: nn.Module, states: Sequence[State], options: RunOptions, round: int) -> None:
        self.stack, self._options = Stack(model.train(), states, frozen=False), options
        self._optimizer = optimizer_of(self.stack.parameters, options, round)

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        self._optimizer.zero_grad()
        with arithmetic(self._options):
            each = F.cross_entropy(self.stack(x).flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
        losses = (each * weights).sum(1)
        losses.sum().backward()
        if self._options.clip:
            clip_gradients(self.stack.parameters, self._options.clip, stacked=True)
        self._optimizer.step()
        return losses


class Fixed:
    """The same in fixed places, a recorded step for each width of a batch: batch norms must not see padding."""

    stays = True

    def __init__(self, model: nn.Module, states: Sequence[State], options: RunOptions, round: int, widest: int) -> None:
        self._widest = widest if has_batch_statistics(model) else 0
        lr = optimizer_of([torch.zeros(1)], options, round).param_groups[0]["lr"]
        self._bench = cached_bench(model, (len(states), lr), lambda: bench(model, states, options, round), states)

    @property
    def stack(self) -> Any:
        return self._bench.stack

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        return self._bench.step(self._widest or x.shape[1], x, y)(x, y, weights)


def bench(model: nn.Module, states: Sequence[State], options: RunOptions, round: int) -> GraphedSteps:
    stack = Stack(model.train(), states, frozen=False)
    optimizer = optimizer_of(stack.parameters, options, round)
    for group in optimizer.param_groups:
        group["capturable"] = stack.parameters[0].is_cuda
    finish = (lambda: clip_gradients(stack.parameters, options.clip, stacked=True)) if options.clip else (lambda: None)
    return GraphedSteps(stack, optimizer, lambda: arithmetic(options), finish)


def evaluate(model: nn.Module, states: Sequence[State], data: Sequence[Examples], batch: int) -> list[Score]:
    """Accuracy and loss of each state on its own examples."""
    counts = [len(d) for d in data]
    right, loss = torch.zeros(len(data)), torch.zeros(len(data))
    with torch.inference_mode():
        stack = Stack(model.eval(), states, frozen=True)
        for step in align([d.rows(batch) for d in data], mean=False):
            x, y = step.of(data[0])
            logits = stack(x)
            each = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(y.shape)
            loss += (each.cpu() * step.weights).sum(1)
            right += ((logits.argmax(-1) == y).cpu() * step.weights).sum(1)
    found = zip(right.tolist(), loss.tolist(), counts, strict=True)
    return [Score(r / max(n, 1), total / max(n, 1), n) for r, total, n in found]
