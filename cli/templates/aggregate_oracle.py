"""Numbers of the paper, or worked out by hand, that must come out: `hfl check` asks for them on the way to gold."""

from __future__ import annotations

import torch

from hetfl import Patch, Update, running_mean
from hetfl.cli.templates.aggregate import Template


def check_by_hand() -> None:
    """Raises AssertionError where a number is another one."""
    old = {"w": torch.tensor([9.0, 9.0, 9.0])}
    one = Update(0, {"w": Patch(torch.tensor([0.0, 0.0]), {0: torch.tensor([0, 1])})}, 1.0)
    two = Update(1, {"w": Patch(torch.tensor([4.0]), {0: torch.tensor([1])})}, 9.0)
    found = running_mean(old, [one, two], Template(power=0.5).weigh)["w"]
    assert found.tolist() == [0.0, (1 * 0 + 3 * 4) / 4, 9.0], "one client, both, none"
