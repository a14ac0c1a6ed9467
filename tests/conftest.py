"""One torch thread, a cache of its own for every test, and whole runs in memory."""

from __future__ import annotations

import pytest
import torch

from hetfl.core import experiment
from hetfl.core.config import resolve
from hetfl.core.cost import Cost
from hetfl.core.rounds import Unwatched


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


TINY = {
    "limit": 120, "clients": 3, "batch_size": 64, "rounds": 3, "epochs": 1, "pretrain_steps": 5, "partition": "iid",
    "model": "mlp", "model_args": {"hidden": [8, 6]}, "levels": "1,0.5,0.5", "control": False,
}  # fmt: skip


@pytest.fixture
def simulate(monkeypatch):
    """A run on few digits, round by round: `simulate(extract=…)` gives the experiment; `steps` the rounds to do at once."""

    def start(steps=None, **values):
        made = experiment.prepare(resolve({**TINY, **values}), Unwatched())
        made.rounds.meter = Unmetered()
        for round in range(1, (made.options.rounds if steps is None else steps) + 1):
            made.rounds.step(round, made.grid)
        return made

    return start


class Unmetered:
    """Costs are not what these tests are about."""

    def of(self, sizes, model=None):
        return Cost(0, 0, 0, 0)
