"""HeteroFL's masked cross entropy, around any extraction."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from hetfl.plugins.wrappers import maskloss
from hetfl.plugins.wrappers.maskloss import mask_logits
from hetfl.rounds.loop import run_round


def test_masked_cross_entropy():
    """spec heterofl 6.5"""
    z = torch.tensor([[2.0, 1.0, -1.0]], requires_grad=True)
    loss = F.cross_entropy(mask_logits(z, torch.tensor([True, False, True])), torch.tensor([0]))
    loss.backward()
    assert loss.item() == pytest.approx(0.169846, abs=1e-6)
    assert z.grad[0, 1] == 0


def test_logits_of_several_exits():
    held = torch.tensor([True, False])
    assert mask_logits(torch.ones(1, 4), held).tolist() == [[1, 0, 1, 0]]
    assert [z.tolist() for z in mask_logits((torch.ones(1, 2), 2 * torch.ones(1, 2)), held)] == [[[1, 0]], [[2, 0]]]


@pytest.mark.parametrize("extract", ["heterofl", "fedrolex", "fjord", "fedconv", "scalefl", "fiarse", "lotteryfl", "hermes"])
def test_rows_of_a_class_that_nobody_holds_stay(simulate, extract):
    """spec heterofl 2.5: whatever the extraction, a class's rows of the head come from the clients that hold it."""
    made = simulate(
        0, extract=extract, aggregate="overlap", wrap=("maskloss", "scaler"), partition="pathological", classes_per_client=2,
        clients=2, levels="1,0.5", pretrain_steps=0,
    )  # fmt: skip
    before = {n: t.clone() for n, t in made.server.state.items()}
    run_round(made.state, 1, made.engine)
    held = torch.stack([c.held_classes for c in made.federation.clients]).any(0)
    last = [n for n, t in made.server.state.items() if n.endswith("weight") and t.shape[0] == 10][-1]
    assert 0 < int(held.sum()) < 10
    after = made.server.state[last]
    assert torch.equal(after[~held], before[last][~held])
    assert not torch.equal(after[held], before[last][held])


@pytest.mark.parametrize("extract", ["fjord", "fiarse"])
def test_the_mask_is_on_what_an_extraction_makes_of_the_forward_pass(simulate, monkeypatch, extract):
    """An extraction that replaces `task.forward` replaces no mask."""
    seen = []
    monkeypatch.setattr(maskloss, "mask_logits", lambda logits, held: seen.append(held) or mask_logits(logits, held))
    simulate(1, extract=extract, wrap=("maskloss",))
    assert len(seen) >= 3


def test_the_head_is_the_last_layer_with_a_row_for_each_class():
    state = {"1.weight": torch.ones(3, 5), "1.bias": torch.ones(3), "4.weight": torch.ones(3, 3), "4.bias": torch.ones(3)}
    assert maskloss.find_head(SimpleNamespace(state=state, classes=3)) == ["4.weight", "4.bias"]
