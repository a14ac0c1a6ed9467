"""Wrappers go with any pair."""

from __future__ import annotations

import pytest
import torch

from helpers.runs import ready
from hetfl.rounds import receiving

PAIRS = [("heterofl", "overlap"), ("fedconv", "kld"), ("fiarse", "hermes"), ("lotteryfl", "overlap"), ("fedmd", "fedmd"),
         ("dac", "median"), ("lgfedavg", "fedavg")]  # fmt: skip


@pytest.fixture
def counted(monkeypatch):
    """Every reply that counts, with the norm of its change."""
    seen, check = [], receiving.check_reply

    def watch(now, client, answer):
        received = check(now, client, answer)
        if received is not None:
            parts = [(t - received.sent[n]).double().flatten() for n, t in received.reply.state.items() if t.is_floating_point()]
            seen.append((received, float(torch.cat(parts).norm()) if parts else 0.0))
        return received

    monkeypatch.setattr(receiving, "check_reply", watch)
    return seen


@pytest.mark.parametrize(("extract", "aggregate"), PAIRS)
@pytest.mark.parametrize("wrap", [("clip",), ("dp", "quantize"), ("quantize", "dp"), ("quantize", "topk"), ("sign",)])
def test_wraps_go_with_any_pair(counted, extract, aggregate, wrap):
    """Whatever the order, what counts of a client is within the norm: after the codec has added its error."""
    norms = {w: {"norm": 0.01} for w in wrap if w in ("clip", "dp")}
    made = ready(2, extract=extract, aggregate=aggregate, wrap=wrap, set=norms)
    assert all("fault" not in row for row in made.state.client_rows), made.state.client_rows[0].get("traceback")
    assert all(t.isfinite().all() for t in made.server.state.values())
    assert len(counted) == 8
    assert not norms or max(norm for _, norm in counted) <= 0.01 * (1 + 1e-4)


@pytest.mark.parametrize("extract", ["lotteryfl", "hermes"])
def test_clipping_brings_no_dead_entry_back_to_life(counted, extract):
    """A client that pruned: entries that do not exist are 0 in what counts of it."""
    ready(2, extract=extract, wrap=("clip",), set={"clip": {"norm": 0.01}, extract: {"threshold": 0.0}})
    pruned = [r for r, _ in counted if r.plan.masks or r.reply.kept]
    assert pruned
    for received in pruned:
        for name, mask in received.plan.masks.items():
            assert not received.reply.state[name][~mask].any()
            assert not received.sent[name][~mask].any()
