"""FlexLoRA (Bai et al., NeurIPS 2024): the mean of the adapters' products, decomposed again; raFLoRA's mean, rank by rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hetfl import Field, Merged, NotApplicable, Plugin, Server, Update, Updates, hookimpl, mean
from hetfl.models.adapters import Adapter, list_adapters, multiply


class FlexLora(Plugin):
    """The weighted mean of B A over the clients, of which the largest singular directions become the ranks, the largest first.

    So a client that gets the first ranks gets the best approximation of the mean. What is no adapter is averaged over the clients
    that have it.
    """

    expected_failures: ClassVar[dict[str, str]] = {
        "keeps_uncovered_entries": "the mean of products is decomposed into all ranks anew, whoever held which"
    }

    by_rank: bool = Field(False, description="average each rank over the clients that have it (raFLoRA), not over all")
    weighting: Literal["uniform", "samples"] = Field("samples", description="one vote a client, or one an example")

    @hookimpl
    def aggregate(self, server: Server, updates: Iterable[Update]) -> Merged:
        updates = Updates(updates, server.state)
        weights, adapters = updates.votes(self.weighting), list_adapters(list(server.state))
        state = mean(updates, weights)
        for adapter in adapters:
            product = average_products(updates, adapter, weights, self.by_rank)
            state[adapter.a], state[adapter.b] = decompose(product, server.state[adapter.a], server.state[adapter.b])
        if not adapters:
            raise NotApplicable(
                "not applicable: the model has no adapters of which both halves are trained (--adapter lora:rank=8)"
            )
        return Merged(state)


def average_products(updates: Updates, adapter: Adapter, weights: Sequence[float], by_rank: bool) -> Tensor:
    """The mean of B A as a matrix (out, in).

    A rank that a client lacks adds nothing to its product. With `by_rank` each rank's part is averaged over those that have the
    rank, and a rank that nobody has stays as it was.
    """
    a, b, held = read_halves(updates, adapter)
    votes = torch.tensor(list(weights))[:, None] * held
    votes = votes / votes.sum(0).clamp(min=1e-30) if by_rank else votes / sum(weights)
    product = sum((multiply(scale_rows(x, w), y) for x, y, w in zip(a, b, votes, strict=True)), torch.zeros(()))
    lost = (~held.any(0)).to(product) * by_rank
    return product + multiply(scale_rows(updates.old[adapter.a], lost), updates.old[adapter.b])


def read_halves(updates: Updates, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    """All clients' A (clients, ranks, in, …) and B (clients, out, ranks, …), and which ranks they have (clients, ranks); where they
    lack one, it is the old.

    Raises NotApplicable where a client sent a part of its ranks' inputs or outputs.
    """
    (a, has_a), (b, has_b) = ((values, has.flatten(2)) for values, has in map(updates.column, (adapter.a, adapter.b)))
    held = has_a.amax(2)
    whole = torch.equal(has_a, held[:, :, None].expand_as(has_a)) and torch.equal(has_b, held[:, None, :].expand_as(has_b))
    if not (whole and held.any(1).all()):
        raise NotApplicable("not applicable: some clients send an adapter in part or not at all; whole products B A are averaged")
    return a, b, held


def scale_rows(a: Tensor, factors: Tensor) -> Tensor:
    """`a` (ranks, …) with each row times its factor (ranks,)."""
    return a * factors.reshape(-1, *[1] * (a.ndim - 1))


def decompose(product: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) in the shapes of `a` and `b` whose product is the best approximation of `product`: A = V', B = U S, the largest first.

    Ranks beyond those that a matrix of its size can have keep their rows of `a`, with 0 in B.
    """
    u, s, v = torch.linalg.svd(product, full_matrices=False)
    count = min(len(s), len(a))
    rows, columns = a.flatten(1).clone(), torch.zeros_like(b.flatten(1))
    rows[:count], columns[:, :count] = v[:count], u[:, :count] * s[:count]
    return rows.reshape(a.shape), columns.reshape(b.shape)
