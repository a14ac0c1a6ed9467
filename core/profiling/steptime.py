"""Seconds of local training as a function of the submodel, fitted from a few of its widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import combinations

import torch
from torch import Tensor

from hetfl.config import PASSES
from hetfl.profiling.cost import Cost

TRUST = 1e-2  # of the even split beside the measurements: they leave a direction open where they are few


@dataclass(frozen=True)
class StepTime:
    """Seconds that each operation takes by itself, each multiply-accumulate, and each byte that operations write.

    The last part does not shrink with the multiply-accumulates: activations shrink with the width, these with its square.
    """

    op: float
    mac: float
    byte: float

    def seconds(self, cost: Cost, steps: float = 1, examples: float | None = None) -> float:
        """Seconds of so many steps on so many `examples` together (default: whole batches of the cost's size)."""
        batches = steps if examples is None else examples / cost.batch
        ops, macs, written = count_step(cost)
        return steps * self.op * ops + batches * (self.mac * macs + self.byte * written)

    def scaled(self, factor: float) -> StepTime:
        """That of a device on which everything takes `factor` times as long."""
        return StepTime(*(factor * each for each in astuple(self)))


def count_step(cost: Cost) -> tuple[float, float, float]:
    """Operations, multiply-accumulates and bytes written of a training step."""
    return cost.ops, PASSES * cost.macs * cost.batch, cost.written


def fit_step_time(costs: Sequence[Cost], seconds: Sequence[float]) -> StepTime:
    """The step time whose relative errors on the measured `seconds` of submodels with these costs are least, no part negative.

    Two widths do not tell three parts apart; of what fits equally, that nearest to three equal shares of the slowest step counts.
    """
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    units = [seconds[slowest] / max(part, 1.0) for part in count_step(costs[slowest])]  # of each part, if it took all the time
    rows = [[p * u / s for p, u in zip(count_step(c), units, strict=True)] for c, s in zip(costs, seconds, strict=True)]
    matrix = torch.cat([torch.tensor(rows, dtype=torch.float64), TRUST * torch.eye(3, dtype=torch.float64)])
    wanted = torch.tensor([1.0] * len(rows) + [TRUST / 3] * 3, dtype=torch.float64)
    return StepTime(*(float(share) * u for share, u in zip(solve_nonnegative(matrix, wanted), units, strict=True)))


def solve_nonnegative(matrix: Tensor, wanted: Tensor) -> Tensor:
    """The x >= 0 with the least |matrix x - wanted|: the best over all sets of entries that are not 0, for there are few."""
    best, least = torch.zeros(matrix.shape[1], dtype=matrix.dtype), float(wanted.norm())
    for count in range(1, matrix.shape[1] + 1):
        for kept in combinations(range(matrix.shape[1]), count):
            found = torch.linalg.lstsq(matrix[:, kept], wanted).solution
            error = float((matrix[:, kept] @ found - wanted).norm())
            if float(found.min()) >= 0 and error < least:
                best, least = torch.zeros_like(best).index_copy(0, torch.tensor(kept), found), error
    return best
