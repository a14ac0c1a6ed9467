"""Norm clipping: tensors scaled down until the L2 norm over all of them is at most a bound."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def clip_factors(tensors: Sequence[Tensor], most: float, slack: float = 0.0) -> Tensor:
    """Factors (clients,) in (0, 1] that bring the L2 norm over all of a client's tensors to at most `most`.

    `tensors` are those of all clients, (clients, *shape) each. The factor is most / (norm + slack), at most 1. Example: for the
    tensors [[3.], [0.]] and [[4.], [1.]] the norms are 5 and 1, and with `most` 2 the factors 0.4 and 1.
    """
    norms = torch.stack([t.reshape(len(t), -1).norm(dim=1) for t in tensors]).norm(dim=0)
    return (most / (norms + slack)).clamp(max=1.0)


def clip_gradients(parameters: Iterable[Tensor], most: float, *, stacked: bool = False) -> None:
    """Scales the gradient of `parameters` IN PLACE to a norm of at most `most`, as torch's clip_grad_norm_ does.

    `stacked`: the parameters are those of several clients (clients, *shape), and each client's gradient is scaled by itself.
    """
    grads = [p.grad if stacked else p.grad[None] for p in parameters if p.grad is not None]
    factors = clip_factors(grads, most, 1e-6)
    for grad in grads:
        grad.mul_(factors.view(-1, *[1] * (grad.ndim - 1)))
