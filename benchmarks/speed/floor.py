"""The floor: what a careful torch user would write by hand for one experiment, and nothing else.

A Python thread a core with one thread of torch each (one thread for the tiny model, whose steps are all dispatch, and on a GPU,
where data, models and sums stay), channels_last, fused SGD, model objects reused, batches by index, widest clients first. Narrow
models are built by hand, weights copied in place.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.speed.work import DEVICE, Work, asked, cut, norm, report, wait

Shapes = tuple[tuple[int, ...], ...]


class Loop:
    """One experiment."""

    def __init__(self, work: Work) -> None:
        torch.set_num_threads(1)
        self.work, self.own, self.federation = work, threading.local(), work.federation
        threads = 1 if work.name.startswith("tiny") or DEVICE != "cpu" else 2
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        self.model = work.module().to(DEVICE)
        self.names = [n for n, _ in self.model.named_parameters()]
        self.state = [p.detach().clone() for p in self.model.parameters()]
        self.buffers = {n: b.clone() for n, b in self.model.named_buffers()}
        self.first = 0.0

    def module(self, ratio: float) -> nn.Module:
        """This thread's model of a width."""
        shelf = self.own.__dict__.setdefault("shelf", {})
        if ratio not in shelf:
            shelf[ratio] = self.work.module(ratio).to(DEVICE, memory_format=torch.channels_last)
        model: nn.Module = shelf[ratio]
        return model

    def loaded(self, ratio: float) -> nn.Module:
        model = self.module(ratio)
        with torch.no_grad():
            torch._foreach_copy_(list(model.parameters()), [cut(t, p) for t, p in zip(self.state, model.parameters(), strict=True)])
        return model

    def train(self, job: tuple[int, int, float]) -> list[Tensor]:
        round, client, ratio = job
        work, model = self.work, self.loaded(ratio).train()
        parameters = list(model.parameters())
        optimizer = torch.optim.SGD(parameters, work.options.lr, work.momentum, fused=True)
        self.first = self.first or time.time()
        for x, y in work.batches(round, client):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if work.clip:
                nn.utils.clip_grad_norm_(parameters, work.clip)
            optimizer.step()
        return [p.detach().clone() for p in parameters]

    def round(self, number: int) -> None:
        jobs = [(number, client, self.work.ratio(client)) for client in self.work.chosen(number)]
        totals, counts = [torch.zeros_like(t) for t in self.state], [torch.zeros_like(t) for t in self.state]
        for trained in self.pool.map(self.train, jobs):  # levels are dealt widest first
            for total, count, t in zip(totals, counts, trained, strict=True):
                cut(total, t).add_(t)
                cut(count, t).add_(1)
        self.state = [torch.where(c > 0, t / c.clamp(min=1), old) for t, c, old in zip(totals, counts, self.state, strict=True)]
        if self.work.evaluates:
            self.look(jobs)

    def look(self, jobs: list[tuple[int, int, float]]) -> None:
        """Static batch norm statistics from the clients' passes, then every level on the test split."""
        sums, counts = (
            {n: torch.zeros_like(b) for n, b in self.buffers.items()},
            {n: torch.zeros_like(b) for n, b in self.buffers.items()},
        )
        for found in self.pool.map(self.statistics, jobs):
            for name, (value, weight) in found.items():
                cut(sums[name], value).add_(value * weight)
                cut(counts[name], value).add_(weight)
        self.buffers = {n: sums[n] / counts[n].clamp(min=1) if b.is_floating_point() else b for n, b in self.buffers.items()}
        test, ratios = self.federation.test, sorted({ratio for _, _, ratio in jobs}, reverse=True)
        pieces = [(ratio, rows) for ratio in ratios for rows in test.index.split(256)]
        list(self.pool.map(self.right, pieces))

    def statistics(self, job: tuple[int, int, float]) -> dict[str, tuple[Tensor, float]]:
        _, client, ratio = job
        model, train = self.loaded(ratio), self.federation.clients[client].train
        for layer in (m for m in model.train().modules() if isinstance(m, nn.BatchNorm2d)):
            layer.reset_running_stats()
            layer.momentum = None  # type: ignore[assignment]
        parts = train.index.split(128)
        with torch.no_grad():
            for rows in parts:
                model(train.x[rows])
        for layer in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            layer.momentum = 0.1
        return {n: (b.clone(), float(len(parts))) for n, b in model.named_buffers() if b.is_floating_point()}

    def right(self, piece: tuple[float, Tensor]) -> int:
        ratio, index = piece
        model = self.loaded(ratio).eval()
        with torch.inference_mode():
            for name, buffer in model.named_buffers():
                buffer.copy_(cut(self.buffers[name], buffer))
            parts = [(self.federation.test.x[rows], self.federation.test.y[rows]) for rows in index.split(128)]
            return sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)


def timed(work: Callable[[int], None], number: int) -> float:
    began = time.perf_counter()
    work(number)
    wait()
    return time.perf_counter() - began


def main() -> None:
    loop = Loop(asked())
    seconds = [timed(loop.round, number) for number in range(1, loop.work.rounds + 2)]
    report(seconds=seconds[1:], first=loop.first, norm=norm(loop.state))


if __name__ == "__main__":
    main()
