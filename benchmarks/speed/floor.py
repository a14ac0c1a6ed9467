"""The floor: what a careful torch user would write by hand for one experiment, and nothing else.

One Python thread a core with one thread of torch each, channels_last, fused SGD, model objects reused, batches by index.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.speed.work import asked, norm, report


def main() -> None:
    work, torch_threads = asked(), 1
    torch.set_num_threads(torch_threads)
    federation, own = work.federation, threading.local()
    pool = ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,))
    model = work.module()
    state = [p.detach().clone() for p in model.parameters()]
    first: list[float] = []

    def train(job: tuple[int, int]) -> list[torch.Tensor]:
        round, client = job
        if not hasattr(own, "model"):
            own.model = work.module().to(memory_format=torch.channels_last)
            own.model.train()
        parameters = list(own.model.parameters())
        with torch.no_grad():
            torch._foreach_copy_(parameters, state)
        optimizer = torch.optim.SGD(parameters, work.options.lr, work.momentum, fused=True)
        first.append(time.time()) if not first else None
        for x, y in work.batches(round, client):
            optimizer.zero_grad()
            F.cross_entropy(own.model(x), y).backward()
            if work.clip:
                nn.utils.clip_grad_norm_(parameters, work.clip)
            optimizer.step()
        return [p.detach().clone() for p in parameters]

    seconds = []
    for round in range(1, work.rounds + 2):
        began = time.perf_counter()
        jobs = [(round, client) for client in work.chosen(round)]
        total = [torch.zeros_like(t) for t in state]
        for trained in pool.map(train, jobs):
            torch._foreach_add_(total, trained)
        torch._foreach_div_(total, len(jobs))
        state = total
        seconds.append(time.perf_counter() - began)
    assert federation is not None
    report(seconds=seconds[1:], first=first[0], norm=norm(state))


if __name__ == "__main__":
    main()
