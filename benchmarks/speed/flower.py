"""Flower's simulation on Ray: the same work with its Message API, two actors of one core, models reused within an actor.

Where clients train submodels, each is sent its leading block, and the server averages over the clients that have an entry.

On a GPU there are `HETFL_BENCH_ACTORS` actors, which share it.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import time
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from torch.nn import functional as F

from benchmarks.speed.work import DEVICE, cut, named, norm, plain, report

WORK = named(os.environ.get("HETFL_WORK", "W"))

ACTORS = int(os.environ.get("HETFL_BENCH_ACTORS", "2"))

MODELS: dict[float, torch.nn.Module] = {}  # by width

NARROW: dict[float, dict[str, torch.Tensor]] = {}  # by width: tensors in the submodel's shapes

client_app, server_app = ClientApp(), ServerApp()


@client_app.query()
def who(message: Message, context: Context) -> Message:
    return Message(RecordDict({"who": ConfigRecord({"client": int(context.node_config["partition-id"])})}), reply_to=message)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    config = message.content["config"]
    round, client = int(str(config["round"])), int(context.node_config["partition-id"])
    ratio = WORK.ratio(client)
    model = MODELS.get(ratio)
    if model is None:
        form = torch.contiguous_format if plain() else torch.channels_last
        model = MODELS[ratio] = WORK.module(ratio).to(DEVICE, memory_format=form).train()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), WORK.options.lr, WORK.momentum, fused=None if plain() else True)
    for x, y in WORK.batches(round, client):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    state = {name: t.cpu().contiguous() for name, t in model.state_dict().items()}
    return Message(RecordDict({"arrays": ArrayRecord(state)}), reply_to=message)


def covering(chosen: list[int], state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How many of the clients have each entry of each tensor."""
    if not WORK.mixed:
        return dict.fromkeys(state, len(chosen))
    counts = {n: torch.zeros_like(t) for n, t in state.items()}
    for client in chosen:
        for name, t in NARROW[WORK.ratio(client)].items():
            cut(counts[name], t).add_(1)
    return counts


def sent(node: int, round: int, arrays: ArrayRecord | None) -> Message:
    content: Any = {"config": ConfigRecord({"round": round})} | ({"arrays": arrays} if arrays else {})
    return Message(RecordDict(content), node, MessageType.TRAIN if arrays else MessageType.QUERY, group_id=str(round))


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    while len(nodes := list(grid.get_node_ids())) < WORK.clients:
        time.sleep(0.05)
    replies = grid.send_and_receive([sent(node, 0, None) for node in nodes])
    homes = {int(str(r.content["who"]["client"])): r.metadata.src_node_id for r in replies}
    NARROW.update({ratio: WORK.module(ratio).state_dict() for ratio in {*WORK.ratios}})
    state, seconds, first = {n: t.contiguous() for n, t in WORK.module().state_dict().items()}, [], time.time()
    for round in range(1, WORK.rounds + 2):
        began = time.perf_counter()
        chosen = WORK.chosen(round)
        arrays = {r: ArrayRecord({n: cut(state[n], t).contiguous() for n, t in like.items()}) for r, like in NARROW.items()}
        asked = [sent(homes[c], round, arrays[WORK.ratio(c)]) for c in chosen]
        found = {r.metadata.src_node_id: r for r in grid.send_and_receive(asked)}
        total = {n: torch.zeros_like(t) for n, t in state.items()}
        for client in chosen:
            for name, t in found[homes[client]].content["arrays"].to_torch_state_dict().items():
                cut(total[name], t).add_(t)
        counts = covering(chosen, state)
        state = {n: t / counts[n] for n, t in total.items()}
        seconds.append(time.perf_counter() - began)
    report(seconds=seconds[1:], first=first, norm=norm(state.values()))


def main() -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    os.environ["RAY_ADDRESS"] = "local"  # not a cluster that somebody left running or its address behind
    gpu: Any = {} if DEVICE == "cpu" else {"num_gpus": 1}
    resources: Any = {
        "client_resources": {"num_cpus": 1, "num_gpus": 1 / ACTORS if gpu else 0.0}, "init_args": {"num_cpus": ACTORS, **gpu}
    }  # fmt: skip
    run_simulation(server_app, client_app, WORK.clients, backend_config=resources)


if __name__ == "__main__":  # by its name, so that the actors import it and keep what it caches
    os.environ["HETFL_WORK"], os.environ["HETFL_LOOP"] = sys.argv[1], "plain" if plain() else ""
    importlib.import_module("benchmarks.speed.flower").main()
