"""Peak memory of each aggregation over 100 ResNet18 clients: `python benchmarks/memory.py`.

The replies (levels 1 to 1/16, twenty clients each) are there before; measured is what an aggregation takes on top, each in a
process of its own. It writes docs/memory.md.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

from hetfl.hooks.loading import load_class

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"

NAMES = ("overlap", "fedavg", "fiarse", "tailorfl", "cluster", "hermes", "median", "trimmed-mean", "kld")

WHY = (
    "`cluster` keeps a model for each budget and `hermes` every client's own values, at its own size: these are their branches.\n"
    "`median` and `trimmed-mean` have the largest tensor of all clients at a time, `kld` every tensor of all of them."
)

LIMIT = 14 << 30  # bytes of address space of a measurement

RATIOS = (1.0, 0.5, 0.25, 0.125, 0.0625)


def peak() -> float:
    """Most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def measure(name: str, clients: int) -> None:
    """Prints (bytes of the replies, bytes on top, seconds) of one aggregation."""
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    import torch

    from hetfl import registry
    from hetfl.aggregation.updates import Update, Updates
    from hetfl.config import resolve
    from hetfl.data.dataset import Examples, ServerData
    from hetfl.hooks.manager import PluginManager
    from hetfl.hooks.server import Server
    from hetfl.hooks.values import Client
    from hetfl.models import zoo as models
    from hetfl.models.state import tensors
    from hetfl.parallel import Pool
    from hetfl.profiling.node import Profile
    from hetfl.submodel.builder import SubmodelBuilder
    from hetfl.submodel.tracing.groups import trace
    from hetfl.submodel.widths import prefix

    model = models.ZOO["resnet18"](classes=10, channels=3)
    widths = trace(model, torch.randn(2, 3, 32, 32), verify=False)
    data = Examples(torch.randn(64, 3, 32, 32), torch.arange(64) % 10, torch.arange(64))
    server = Server(resolve({}), SubmodelBuilder(model, widths), tensors(model), 10, ServerData(data, data), Pool(1))
    updates, held = [], 0
    for client in range(clients):
        ratio = RATIOS[client * len(RATIOS) // clients]
        server.clients[client] = Client(client, Profile(ratio))
        plan = server.select(prefix(ratio))
        trained = {n: t.clone() + (0.01 if t.is_floating_point() else 1) for n, t in plan.take(server.state).items()}
        held += sum(t.numel() * t.element_size() for t in trained.values())
        updates.append(Update(client, plan.put(trained), 10.0))
    plugin = load_class(registry.find("aggregate", name))()
    before = peak()
    PluginManager({f"aggregate.{name}": plugin}).aggregate(server, Updates(updates, server.state), 1)
    print(held, peak() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--only")
    given = parser.parse_args()
    if given.only:
        measure(given.only, given.clients)
        return
    rows = []
    for name in NAMES:
        words = [sys.executable, __file__, "--only", name, "--clients", str(given.clients)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            rows.append(f"| `{name}` | more than 12,000 MB | |")
        else:
            held, top = (float(v) for v in done.stdout.split())
            rows.append(f"| `{name}` | {top / 1e6:,.0f} MB | {top / 44.7e6:.1f} |")
            head = f"Replies of {given.clients} ResNet18 clients, levels 1 to 1/16: {held / 1e6:,.0f} MB."
        print(rows[-1], done.stderr[-300:])
    lines = ["# Memory of the aggregations", "", "Written by `python benchmarks/memory.py`. " + head,
             "What an aggregation takes on top of them and of the global model, at its peak:", "",
             "| aggregation | memory | in models of 44.7 MB |", "|---|---|---|", *rows, "", WHY]  # fmt: skip
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
