"""Norm clipping: tensors scaled down until the L2 norm over all of them is at most a bound."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


def clip_factors(tensors: Sequence[Tensor], most: float, slack: float = 0.0) -> Tensor:
    """Factors (clients,) in (0, 1] that bring the L2 norm over all of a client's tensors to at most `most`.

    `tensors` are those of all clients, (clients, *shape) each. The factor is most / (norm + slack), at most 1. Example: for the
    tensors [[3.], [0.]] and [[4.], [1.]] the norms are 5 and 1, and with `most` 2 the factors 0.4 and 1.
    """
    each = [torch.linalg.vector_norm(t, dim=tuple(range(1, t.ndim))) if t.ndim > 1 else t.abs() for t in tensors]
    norms = torch.linalg.vector_norm(torch.stack(each), dim=0)
    factors: Tensor = (most / (norms + slack)).clamp(max=1.0)
    return factors


def clip_gradients(parameters: Iterable[Tensor], most: float, *, stacked: bool = False) -> None:
    """Scales the gradient of `parameters` IN PLACE to a norm of at most `most`, by torch's clip_grad_norm_.

    `stacked`: the parameters are those of several clients (clients, *shape), and each client's gradient is scaled by itself.
    """
    if not stacked:
        nn.utils.clip_grad_norm_(parameters, most)
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    factors = clip_factors(grads, most, 1e-6)
    for grad in grads:
        grad.mul_(factors.view(-1, *[1] * (grad.ndim - 1)))
