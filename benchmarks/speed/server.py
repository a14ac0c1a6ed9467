"""FedConv's server phase: tuning the compressors of three size classes beside the same steps without filters.

`python -m benchmarks.speed.server profile` prints what torch spends both on, of fedconv-cnn.
"""

from __future__ import annotations

import statistics
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.speed.work import report

RATIOS = (0.75, 0.5, 0.25)

IMAGES, BATCH = 500, 64


def measure(net: str, shape: tuple[int, ...], steps: int, repeats: int, args: dict[str, Any]) -> dict[str, Any]:
    """Medians of `repeats` after one to warm up, in turn."""
    from hetfl.config import resolve
    from hetfl.data.dataset import Examples, ServerData
    from hetfl.hooks.server import Server
    from hetfl.hooks.values import Client
    from hetfl.models import zoo as models
    from hetfl.models.state import tensors
    from hetfl.plugins.methods.fedconv.compression import Compressor, plain_form
    from hetfl.plugins.methods.fedconv.fast import fast_form
    from hetfl.plugins.methods.fedconv.filters import Filters
    from hetfl.plugins.methods.fedconv.strategy import FedConv
    from hetfl.plugins.methods.fedconv.tiling import tile_parameters
    from hetfl.profiling.node import Profile
    from hetfl.submodel.builder import SubmodelBuilder
    from hetfl.submodel.tracing.groups import trace
    from hetfl.submodel.widths import prefix

    torch.set_num_threads(1)
    model = models.ZOO[net](classes=10, channels=shape[0], **args)
    widths = trace(model, torch.randn(2, *shape), verify=False)
    x, y, cut = torch.randn(IMAGES, *shape), torch.arange(IMAGES) % 10, IMAGES * 3 // 4
    public = ServerData(Examples(x, y, torch.arange(cut)), Examples(x, y, torch.arange(cut, IMAGES)))
    pool: Any = SimpleNamespace(map=lambda function, items: [function(item) for item in items])  # in this thread, for the profile
    server = Server(resolve({}), SubmodelBuilder(model, widths), tensors(model), 10, public, pool)

    def plain() -> None:
        server.predict(server.state, x)  # the teacher
        for ratio in RATIOS:
            small = server.builder.module(server.select(prefix(ratio)).sizes).eval()
            for step in range(steps + 1):
                if step % 10 == 0 or step == steps:
                    with torch.no_grad():
                        small(x[cut:])
                if step < steps:
                    rows = torch.randperm(cut)[:BATCH]
                    small.zero_grad()
                    F.cross_entropy(small(x[rows]), y[rows]).backward()

    def tuned() -> None:
        FedConv(first_steps=steps, patience=0).extract(server, [Client(i, Profile(r)) for i, r in enumerate((1.0, *RATIOS))], 1)

    def compress(form: Any) -> None:
        """The steps of compression alone, forward and backward."""
        names = [n for n, _ in model.named_parameters()]
        for ratio in RATIOS:
            selection = server.select(prefix(ratio))
            filters = Filters(selection, tile_parameters(selection, server.state, names))
            filters.active = bool(filters.flat.requires_grad_().numel())
            small = Compressor(filters, server.state, form=form)
            for _ in range(steps):
                out = [t for t in small().values() if t.requires_grad]
                torch.autograd.backward(out, [torch.ones_like(t) for t in out])

    def fast() -> None:
        compress(fast_form)

    def method() -> None:
        compress(plain_form)

    if "profile" in sys.argv:
        print_profile(plain)
        print_profile(tuned)
    rows = [{w.__name__: seconds(w) for w in (plain, tuned, fast, method)} for _ in range(1 + repeats)][1:]
    found = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    extract, slower = found["tuned"], found["method"] - found["fast"]
    return {
        "net": net, "plain": found["plain"], "extract": extract, "share": found["fast"] / extract,
        "method": found["method"] / found["fast"], "extract by method": (extract + slower) / extract,
    }  # fmt: skip


def seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def print_profile(work: Any) -> None:
    """What torch spends a second run of `work` on."""
    work()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        work()
    print(work.__name__, seen.key_averages().table(sort_by="cpu_time_total", row_limit=40, max_name_column_width=60))


def main() -> None:
    nets = [measure("fedconv-cnn", (1, 28, 28), 60, 7, {"size": 28})]
    if "profile" not in sys.argv:
        nets.append(measure("resnet18", (3, 32, 32), 4, 2, {}))
    report(nets=nets)


if __name__ == "__main__":
    main()
