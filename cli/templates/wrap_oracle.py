"""Numbers of the paper, or worked out by hand, that must come out: `hfl check` asks for them on the way to gold."""

from __future__ import annotations

import torch
from torch import nn

from hetfl.cli.templates.wrap import Template


def check_by_hand() -> None:
    """Raises AssertionError where a number is another one."""
    model = nn.Linear(2, 1, bias=False)
    start = [p.detach() - torch.tensor([[3.0, 4.0]]) for p in model.parameters()]
    found = float(Template(mu=0.1).penalty(model, start).detach())
    assert abs(found - 0.1 / 2 * 25) < 1e-5, f"the distance is 5, so the penalty is 1.25, not {found}"
