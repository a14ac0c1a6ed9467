"""Flower's simulation on Ray: the same work with its Message API, two actors of one core, models reused within an actor.

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

from benchmarks.speed.work import DEVICE, named, norm, plain, report

WORK = named(os.environ.get("HETFL_WORK", "W"))

ACTORS = int(os.environ.get("HETFL_BENCH_ACTORS", "2"))

MODELS: dict[str, torch.nn.Module] = {}

client_app, server_app = ClientApp(), ServerApp()


@client_app.query()
def who(message: Message, context: Context) -> Message:
    return Message(RecordDict({"who": ConfigRecord({"client": int(context.node_config["partition-id"])})}), reply_to=message)


@client_app.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    config = message.content["config"]
    round, client = int(str(config["round"])), int(context.node_config["partition-id"])
    model = MODELS.get("it")
    if model is None:
        form = torch.contiguous_format if plain() else torch.channels_last
        model = MODELS["it"] = WORK.module().to(DEVICE, memory_format=form).train()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), WORK.options.lr, WORK.momentum, fused=None if plain() else True)
    for x, y in WORK.batches(round, client):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    state = {name: t.cpu().contiguous() for name, t in model.state_dict().items()}
    return Message(RecordDict({"arrays": ArrayRecord(state)}), reply_to=message)


def sent(node: int, round: int, arrays: ArrayRecord | None) -> Message:
    content: Any = {"config": ConfigRecord({"round": round})} | ({"arrays": arrays} if arrays else {})
    return Message(RecordDict(content), node, MessageType.TRAIN if arrays else MessageType.QUERY, group_id=str(round))


@server_app.main()
def serve(grid: Grid, context: Context) -> None:
    while len(nodes := list(grid.get_node_ids())) < WORK.clients:
        time.sleep(0.05)
    replies = grid.send_and_receive([sent(node, 0, None) for node in nodes])
    homes = {int(str(r.content["who"]["client"])): r.metadata.src_node_id for r in replies}
    state, seconds, first = {n: t.contiguous() for n, t in WORK.module().state_dict().items()}, [], time.time()
    for round in range(1, WORK.rounds + 2):
        began = time.perf_counter()
        arrays, chosen = ArrayRecord(state), WORK.chosen(round)
        found = {r.metadata.src_node_id: r for r in grid.send_and_receive([sent(homes[c], round, arrays) for c in chosen])}
        total = {n: torch.zeros_like(t) for n, t in state.items()}
        for client in chosen:
            for name, t in found[homes[client]].content["arrays"].to_torch_state_dict().items():
                total[name] += t
        state = {n: t / len(chosen) for n, t in total.items()}
        seconds.append(time.perf_counter() - began)
    report(seconds=seconds[1:], first=first, norm=norm(state.values()))


def main() -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    gpu: Any = {} if DEVICE == "cpu" else {"num_gpus": 1}
    resources: Any = {
        "client_resources": {"num_cpus": 1, "num_gpus": 1 / ACTORS if gpu else 0.0}, "init_args": {"num_cpus": ACTORS, **gpu}
    }  # fmt: skip
    run_simulation(server_app, client_app, WORK.clients, backend_config=resources)


if __name__ == "__main__":  # by its name, so that the actors import it and keep what it caches
    os.environ["HETFL_WORK"], os.environ["HETFL_LOOP"] = sys.argv[1], "plain" if plain() else ""
    importlib.import_module("benchmarks.speed.flower").main()
