"""What a width costs on this machine: a timed step is a whole one, and memory that the page cache holds is free."""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from hetfl.config import resolve
from hetfl.data.dataset import Examples
from hetfl.data.kinds import find_kind
from hetfl.models.early_exit import add_exits
from hetfl.models.state import tensors
from hetfl.profiling import meter
from hetfl.profiling.cost import measure_step
from hetfl.submodel.builder import SubmodelBuilder
from hetfl.submodel.widths import Widths
from hetfl.training.local import make_step


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_timed_step_is_one_of_local_training(optimizer):
    """The optimiser's step is part of it: the model that was timed has taken four, the first to warm up."""
    torch.manual_seed(0)
    model, again = nn.Linear(4, 3), nn.Linear(4, 3)
    again.load_state_dict(model.state_dict())
    x, y, options = torch.randn(6, 4), torch.arange(6) % 3, resolve({"optimizer": optimizer, "lr": 0.1, "clip": 0.5})
    assert meter.time_step(make_step(model, options), x, y) > 0
    by_hand = torch.optim.Adam(again.parameters(), 0.1) if optimizer == "adam" else torch.optim.SGD(again.parameters(), 0.1, 0.9)
    for _ in range(4):
        by_hand.zero_grad()
        nn.functional.cross_entropy(again(x), y).backward()
        nn.utils.clip_grad_norm_(again.parameters(), 0.5)
        by_hand.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(tensors(model).values(), tensors(again).values(), strict=True))


@pytest.mark.parametrize(("task", "y"), [("classify", torch.tensor([0, 1])), ("multilabel", torch.eye(3)[:2])])
def test_a_model_with_exits_is_measured_with_all_of_them_whatever_its_targets(task, y):
    x = torch.randn(2, 4)
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 3))
    builder = SubmodelBuilder(add_exits(net, x, 3, 2, 0), Widths((), {}, {}))
    found = meter.Meter(resolve({}), builder, Examples(x, y, torch.arange(2), find_kind(task))).cost(None)
    assert found.macs == 4 * 5 + 2 * 5 * 5 + 2 * 5 * 3


class Fails:
    def __del__(self):
        raise ValueError


class LeavesGarbage(torch.optim.SGD):
    """Whose step ends where a collector that begins by itself finds an object that cannot be ended well."""

    def step(self):
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        super().step()
        unended = Fails()
        unended.itself = unended
        del unended
        return [[] for _ in gradients * 50]


def test_memory_is_that_of_the_step_whoever_keeps_the_traceback_of_an_error_in_it(monkeypatch):
    """As pytest does with errors of objects that are collected: their frames hold the step's own, and so its gradients."""
    kept, found = [], []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: kept.append(error.exc_value))
    often = gc.get_threshold()
    try:
        for optimizer, threshold in ((torch.optim.SGD, 0), (LeavesGarbage, 1)):
            gc.set_threshold(threshold)
            torch.manual_seed(0)
            make = lambda model, kind=optimizer: kind(model.parameters(), lr=0.1, momentum=0.9)  # noqa: E731
            found.append(measure_step(nn.Linear(50, 3), torch.randn(4, 50), torch.arange(4) % 3, make))
    finally:
        gc.set_threshold(*often)
        gc.collect()
    assert found[0].peak == found[1].peak
    assert len(kept) == 2  # the garbage of both steps was there, and is collected now
    assert gc.isenabled()


def test_a_step_has_ended_when_its_device_has(monkeypatch):
    """A GPU is given work and does it later: what it still has to do is waited for within the time that is taken."""
    monkeypatch.setattr(meter, "wait_for", lambda device: time.sleep(0.02))
    model, options = nn.Linear(2, 2), resolve({})
    assert meter.time_step(make_step(model, options), torch.randn(2, 2), torch.tensor([0, 1])) >= 0.02


def test_a_gpu_is_waited_for_and_a_cpu_is_not(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    for name in ("cpu", "cuda", "cuda:1"):
        meter.wait_for(torch.device(name))
    assert waited == [torch.device("cuda"), torch.device("cuda:1")]


def test_what_the_page_cache_holds_is_free():
    """The system's own estimate of what programs can have, which is more than what lies idle."""
    if not (info := Path("/proc/meminfo")).exists():
        pytest.skip("no /proc/meminfo on this system")
    lines = dict(line.split(":") for line in info.read_text().splitlines())
    available, idle = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemFree"))
    assert abs(meter.free_memory() - available) < max(abs(meter.free_memory() - idle), 0.05 * available)
