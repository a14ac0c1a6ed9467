"""Several clients' models of one shape as one (torch.func.vmap): their batches side by side, a step of all, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hetfl.config import RunOptions
from hetfl.data.dataset import Examples
from hetfl.data.kinds import TaskKind
from hetfl.models.state import State, list_places, tensors
from hetfl.training.augmentation import augment
from hetfl.training.device import autocast
from hetfl.training.evaluation import Score
from hetfl.training.local import make_optimizer_for
from hetfl.training.task import Task


def stack_states(states: Sequence[State], device: torch.device) -> State:
    """Tensors (clients, *shape) on `device` of the clients' tensors (*shape); where all states are one object, that one repeated.

    torch.func.stack_module_state does this for modules; here there is one module and a state for each client.
    """
    rows = {name: join_rows(states, name, device) for name in states[0]}
    if all(state is states[0] for state in states):
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in rows.items()}
    return rows


def copy_into(stacked: State, states: Sequence[State]) -> None:
    """Copies the clients' `states` into tensors (clients, *shape) that exist."""
    for name, tensor in stacked.items():
        tensor.copy_(join_rows(states, name, tensor.device))


def join_rows(states: Sequence[State], name: str, device: torch.device) -> Tensor:
    """One tensor of all clients (clients, *shape) on `device`; a view of one client's where all states are one object."""
    first = states[0][name].detach()
    if all(state is states[0] for state in states):
        return first.to(device).expand(len(states), *first.shape)
    return torch.stack([state[name].detach() for state in states]).contiguous().to(device)  # vmap pools channels last one by one


class ModelStack:
    """The models of several clients as one. `values` are all tensors (clients, *shape), `parameters` those that are trained."""

    def __init__(self, model: nn.Module, states: Sequence[State], trained: bool = True) -> None:
        device = next(model.parameters()).device
        self.model, self.values = model, stack_states(states, device)
        self._places = [(place, name) for place, name in list_places(model) if name in self.values]
        names = [n for n, p in model.named_parameters() if trained and p.requires_grad and n in self.values]
        self.parameters = [self.values[n].requires_grad_() for n in names]

    def __call__(self, x: Tensor) -> Tensor:
        """Answers (clients, N, …) to x (clients, N, *shape)."""
        out: Tensor = torch.func.vmap(self._call_one)(self.values, x)
        return out

    def _call_one(self, values: State, x: Tensor) -> Any:
        return torch.func.functional_call(self.model, self._place(values), (x,), tie_weights=False)

    def _place(self, values: State, prefix: str = "") -> State:
        """One client's tensors by where they stand in a module that has the model as `prefix` (see `call_with`)."""
        return {prefix + place: values[name] for place, name in self._places}

    def penalties(self) -> Tensor | None:
        """What is added to each client's loss (clients,), or None."""
        return None

    def states(self) -> list[State]:
        """The tensors of each client as they are now, views of the stacked ones."""
        rows = zip(*(tensor.detach().unbind(0) for tensor in self.values.values()), strict=True)
        return [dict(zip(self.values, row, strict=True)) for row in rows]


class NotStackableError(ValueError):
    """Tasks have more of their own than a stack can give each: their clients train one by one."""


class TaskStack(ModelStack):
    """The tasks of several clients as one: the first one's forward pass and penalties, on each client's tensors and constants.

    Raises NotStackableError where a task has more of its own than that.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        if any(task.masks or task.loss != task.kind.loss for task in tasks):
            raise NotStackableError("clients whose tasks have masks or a loss of their own do not train as one")
        self._task = tasks[0]
        super().__init__(self._task.model.train(), [tensors(task.model) for task in tasks])
        self._constants = stack_states([task.constants for task in tasks], next(self.model.parameters()).device)
        penalties = self._task.penalties
        self._forward = Part(self.model, self._task.forward)
        self._penalties = Part(self.model, lambda model: torch.stack([penalty(model) for penalty in penalties]).sum())

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self._compute(self._forward, x)
        return out

    def penalties(self) -> Tensor | None:
        if not self._task.penalties:
            return None
        total: Tensor = self._compute(self._penalties)
        return total

    def _compute(self, part: Part, *inputs: Tensor) -> Any:
        """What `part` computes for each client, with its tensors in the model and its constants in the task."""
        own = self._task.constants

        def compute_one(values: State, constants: State, *inputs: Tensor) -> Any:
            self._task.constants = constants
            return torch.func.functional_call(part, self._place(values, "model."), inputs, tie_weights=False)

        try:
            return torch.func.vmap(compute_one)(self.values, self._constants, *inputs)
        finally:
            self._task.constants = own


class Part(nn.Module):
    """`compute(model, *inputs)` as a module that has `model` as a part: functional_call then reaches whatever is done with it."""

    def __init__(self, model: nn.Module, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self._compute = model, compute

    def forward(self, *inputs: Tensor) -> Any:
        return self._compute(self.model, *inputs)


class EagerStep:
    """One step of local training of the clients of `stack`: forward, backward, each client's clipping, optimiser.

    With `in_place`, gradients keep their storage from step to step and the optimiser's step can be recorded (CUDA graphs).
    """

    def __init__(self, stack: ModelStack, options: RunOptions, round: int, kind: TaskKind, in_place: bool = False) -> None:
        self.stack, self.in_place, self._options, self._autocast = stack, in_place, options, autocast(options)
        self._kind = kind
        self.optimizer = make_optimizer_for(self.stack.parameters, options, round)
        if in_place:
            for group in self.optimizer.param_groups:
                group["capturable"] = self.stack.parameters[0].is_cuda

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
        """The clients' losses (clients,) on x (clients, N, *shape), y (clients, N, …) and weights (clients, N), before the step."""
        self.optimizer.zero_grad(set_to_none=not self.in_place)
        with self._autocast:
            each = self._kind.losses(self.stack(x).flatten(0, 1), y.flatten(0, 1)).view(weights.shape)
            penalties = self.stack.penalties()
        weights = self._kind.weigh(weights, y) if self._kind.tokens else weights
        losses = (each * weights).sum(1)
        losses = losses if penalties is None else losses + penalties
        losses.sum().backward()
        if self._options.clip:
            self._clip(self._options.clip)
        self.optimizer.step()
        return losses.detach()

    def _clip(self, most: float) -> None:
        """Scales the gradient of each client by itself, IN PLACE, to a norm of at most `most`."""
        grads = [p.grad for p in self.stack.parameters if p.grad is not None]
        factors = clip_factors(grads, most, 1e-6)
        for grad in grads:
            grad.mul_(factors.view(-1, *[1] * (grad.ndim - 1)))


def clip_factors(tensors: Sequence[Tensor], most: float, slack: float = 0.0) -> Tensor:
    """Factors (clients,) in (0, 1] that bring the L2 norm over all of a client's tensors to at most `most`.

    `tensors` are those of all clients, (clients, *shape) each. The factor is most / (norm + slack), at most 1. Example: for the
    tensors [[3.], [0.]] and [[4.], [1.]] the norms are 5 and 1, and with `most` 2 the factors 0.4 and 1.
    """
    each = [torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim))) if t.ndim > 1 else t.abs() for t in tensors]
    norms = torch.linalg.vector_norm(torch.stack(each), dim=0)
    factors: Tensor = (most / (norms + slack)).clamp(max=1.0)
    return factors


WINDOW = 256  # steps whose batches are laid out at a time


@dataclass(frozen=True, eq=False)
class GroupBatch:
    """One step's batch of each client side by side: `rows` (clients, N) of the data set, as wide as the largest of them.

    `counts` are the clients' numbers of rows; `weights` (clients, N) are 0 where a row is padding, else 1, or 1 / the client's
    number of rows. `ending` are the positions of the clients that have no further batch.
    """

    rows: Tensor
    weights: Tensor
    counts: list[int]
    ending: list[int]

    def gather(self, data: Examples) -> tuple[Tensor, Tensor]:
        """x (clients, N, *shape) and y (clients, N, …)."""
        flat = self.rows.flatten()
        return data.x[flat].unflatten(0, self.rows.shape), data.y[flat].unflatten(0, self.rows.shape)


class Step(Protocol):
    """A step of all clients of `stack`, as EagerStep is; with `in_place` it writes to the same tensors again and again."""

    stack: ModelStack
    in_place: bool

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor) -> Tensor: ...


def run_steps(
    step: Step, batches: Iterable[GroupBatch], data: Examples, options: RunOptions, draws: Sequence[torch.Generator],
) -> dict[int, tuple[State, float]]:  # fmt: skip
    """Takes `step` on each of `batches`: for each client that had one, by its position, its tensors after its last batch and the
    loss on that before the step.

    Pictures are augmented as `options` say, each client's by its own generator of `draws`.
    """
    ended: dict[int, tuple[State, float]] = {}
    for batch in batches:
        x, y = batch.gather(data)
        if options.augment:
            for k, (count, generator) in enumerate(zip(batch.counts, draws, strict=True)):
                x[k, :count] = augment(x[k, :count], options, generator)
        losses = step(x, y, batch.weights)
        if batch.ending:
            now, last = step.stack.states(), losses.tolist()
            shared = step.in_place or len(ended) + len(batch.ending) < len(batch.rows)  # later steps write to these tensors
            ended |= {k: ({n: t.clone() if shared else t for n, t in now[k].items()}, last[k]) for k in batch.ending}
    return ended


def align_batches(orders: Sequence[Sequence[Tensor]], mean: bool) -> Iterator[GroupBatch]:
    """The clients' batches side by side, step by step; `orders` holds for each client the rows (N,) of each of its batches.

    With `mean` a client's weights of a step sum to 1, so that the weighted sum of losses is the mean over its batch. With batches
    of 2 rows and of 1, the weights are (1/2, 1/2) and (1, 0). WINDOW steps are laid out at a time.
    """
    for begin in range(0, max(map(len, orders)), WINDOW):
        rows, counts = lay_out([order[begin : begin + WINDOW] for order in orders])
        real = torch.arange(rows.shape[2]) < counts[..., None]
        weights = (real / counts.clamp(min=1)[..., None] if mean else real.float()).to(rows.device)
        for step, of_step in enumerate(counts.T.tolist()):
            ending = [k for k, order in enumerate(orders) if len(order) == begin + step + 1]
            yield GroupBatch(rows[:, step, : max(of_step)], weights[:, step, : max(of_step)], of_step, ending)


def lay_out(orders: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """The rows of all batches as one tensor (clients, steps, N), where the batches are, and their numbers (clients, steps)."""
    steps = max(map(len, orders))
    counts = torch.tensor([[len(rows) for rows in order] + [0] * (steps - len(order)) for order in orders])
    rows = next(rows for order in orders for rows in order).new_zeros(*counts.shape, int(counts.max()))
    for k, order in enumerate(orders):
        if order:
            padded = pad_sequence(list(order), batch_first=True)
            rows[k, : len(order), : padded.shape[1]] = padded
    return rows, counts


def evaluate(model: nn.Module, states: Sequence[State], data: Sequence[Examples], batch: int) -> list[Score]:
    """Score and loss of each state on its own examples, in batches of `batch`."""
    orders, kind = [d.rows(batch) for d in data], data[0].kind
    right, of, loss, units = (torch.zeros(len(data)) for _ in range(4))
    with torch.inference_mode():
        stack = ModelStack(model.eval(), states, trained=False)
        for step in align_batches(orders, mean=False):
            x, y = step.gather(data[0])
            out, flat = stack(x).flatten(0, 1), y.flatten(0, 1)
            graded = kind.grade(out, flat)
            for total, values in zip((right, of, units, loss), (*graded, kind.losses(out, flat) * graded[2]), strict=True):
                total += (values.view(step.weights.shape).cpu() * step.weights).sum(1)
    sums = zip(*(t.tolist() for t in (right, of, loss, units)), orders, strict=True)
    return [Score(r / max(o, 1), t / max(n, 1), sum(map(len, order))) for r, o, t, n, order in sums]
