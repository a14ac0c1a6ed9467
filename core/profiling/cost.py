"""What a module costs, measured on the module itself: parameters, multiply-accumulates, training memory, bytes to send."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hetfl.data.kinds import CLASSIFY, TaskKind
from hetfl.models.frozen import frozen
from hetfl.models.state import tensors
from hetfl.submodel import encoding


@dataclass(frozen=True)
class Cost:
    """What a module costs a client.

    parameters   their number
    macs         multiply-accumulates of the forward pass of one example
    memory       the most bytes of tensors alive at once in a training step
    bytes        size of its tensors encoded for sending
    ops          torch operations of a training step
    written      bytes of the tensors that these make: activations, their gradients and the parameters'
    batch        examples of that step
    """

    parameters: int
    macs: int
    memory: int
    bytes: int
    ops: int = 0
    written: int = 0
    batch: int = 1


MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


def use_momentum(model: nn.Module) -> torch.optim.Optimizer:
    """SGD with momentum, the default of a run."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01, 0.9, fused=True)


def measure_cost(
    model: nn.Module, x: Tensor, y: Tensor, batch: int = 32, optimizer: MakeOptimizer = use_momentum, kind: TaskKind = CLASSIFY
) -> Cost:
    """The cost of `model` on examples x (N, *shape), y (N, …), repeated to a batch of `batch` for training steps of
    `optimizer(model)`. The model's values change.
    """
    rows = torch.arange(batch) % len(x)
    step = measure_step(model, x[rows], y[rows], optimizer, kind)
    sent = encoding.payload_bytes(tensors(model))
    return Cost(count_parameters(model), count_macs(model, x[:1]), int(step.peak), sent, step.ops, int(step.written), batch)


def count_parameters(model: nn.Module) -> int:
    """The number of the model's parameters, the frozen ones included; buffers do not count."""
    return sum(p.numel() for p in (*model.parameters(), *frozen(model).values()))


def count_macs(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of one forward pass of x (N, *shape) in evaluation mode."""
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    with counter, torch.no_grad():
        model.eval()(x)
    return int(counter.get_total_flops()) // 2


def count_recurrent_flops(x: tuple[int, ...], w_ih: tuple[int, ...], w_hh: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Flops of one layer and direction of an LSTM on x (L, N, features): a product with both weights for each step and example."""
    return 2 * x[0] * x[1] * (w_ih[0] * w_ih[1] + w_hh[0] * w_hh[1])


def count_attention_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Flops of scaled dot product attention of q (N, heads, L, E): queries with keys, then weights with values."""
    rows = q[0] * q[1] * q[2] * k[2]
    return 2 * rows * (q[3] + v[3])


FLOP_FORMULAS = {  # of ops that torch's own counter leaves out
    torch.ops.aten.mkldnn_rnn_layer: count_recurrent_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count_attention_flops,
}


def measure_step(
    model: nn.Module, x: Tensor, y: Tensor, make_optimizer: MakeOptimizer = use_momentum, kind: TaskKind = CLASSIFY
) -> LiveBytes:
    """The most bytes of tensors alive at once over two training steps, and what the second, which holds the momentum, did.

    Python collects no garbage meanwhile: an error in a `__del__` of somebody's would come up in the step, and who keeps its
    traceback keeps the step's tensors.
    """
    optimizer = make_optimizer(model)
    alive = LiveBytes([*model.parameters(), *model.buffers(), x, y])
    with without_collection(), alive:
        for _ in range(2):
            alive.ops = alive.written = 0
            optimizer.zero_grad()
            kind.loss(model.train()(x), y).backward()
            optimizer.step()
    return alive


@contextmanager
def without_collection() -> Iterator[None]:
    """Python's collector of garbage does not begin by itself meanwhile."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages from the op that makes them until they are freed: `now`, and their `peak` so far.

    `ops` are the operations, `written` the bytes of the tensors that they made or changed.
    """

    def __init__(self, held: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak, self.ops, self.written = 0, 0, 0, 0
        self._seen: set[int] = set()
        for tensor in held:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, storage._cdata, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.ops += 1
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.written += 0 if func.is_view else leaf.numel() * leaf.element_size()
                self._add(leaf)
        return out
