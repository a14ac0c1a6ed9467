"""Many clients, clients that come and go, and a real federation's rounds: `python benchmarks/load.py`.

10,000 clients of a small model, 100 a round, on the local engine: peak memory and seconds by round. Then 50 nodes behind the remote
grid of a federation (in one process, without Flower's transport and its waits), of which some leave and join at random every round.
Then three SuperNodes on this machine (`--only federation`): the seconds of a round, of its phases, and of the clients' own work.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from hetfl.config import format_run_file, resolve
from hetfl.engines.flower.export import export
from hetfl.engines.flower.node import build_runtime, make_client_app
from hetfl.engines.flower.superlink import LocalFederation
from hetfl.parallel import Pool
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import runner
from hetfl.runs.folder import RunFolder

ROOT = Path(__file__).parents[1]

sys.path.insert(0, str(ROOT))

from benchmarks.speed.work import dataset  # noqa: E402

MANY = {
    "extract": "heterofl", "aggregate": "overlap", "partition": "iid", "clients": 10_000, "fraction": 0.01, "own_test": 0,
    "server_data": 0, "epochs": 1, "model": "mlp", "model_args": {"hidden": [64]}, "levels": "1:2,0.5:4,0.25:4", "eval_every": 1000,
}  # fmt: skip


GONE = "the node left"  # what Flower says of a node that is gone, in other words

SMALL = {
    "dataset": "digits", "limit": 300, "clients": 3, "epochs": 1, "pretrain_steps": 20, "levels": "1,0.5,0.25",
    "extract": "fedconv", "aggregate": "kld", "engine": "flower",
}  # fmt: skip


def peak() -> float:
    """Most memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def many(rounds: int, extract: str) -> dict[str, Any]:
    """10,000 clients, 100 a round."""
    options = resolve({**MANY, "extract": extract, "dataset": str(dataset(60_000)), "rounds": rounds})
    with tempfile.TemporaryDirectory() as place:
        folder, seen = RunFolder(Path(place) / "run").open(), list[float]()

        class Watch(NoCallback):
            def done(self, row: dict[str, Any]) -> None:
                seen.append(peak())

        runner.run(options, folder, Watch())
        lines = (folder.path / "metrics.csv").read_text().splitlines()
        held = sum(p.stat().st_size for p in (folder.path / "checkpoints").rglob("*") if p.is_file())
    at = lines[0].split(",").index("seconds")
    seconds = [float(line.split(",")[at]) for line in lines[1:]]
    return {"extract": extract, "rounds": rounds, "seconds": statistics.median(seconds[1:]), "peak MB after 1 round": seen[0],
            "peak MB at the end": seen[-1], "checkpoint MB": held / 1e6}  # fmt: skip


def context_of(client: int, clients: int) -> Context:
    """The context of the node that holds partition `client`."""
    given: Any = {"partition-id": client, "num-partitions": clients}
    return Context(run_id=1, node_id=client + 2, node_config=given, state=RecordDict(), run_config={})


class Crowd:
    """Nodes that come and go, as Flower's grid shows them; each answers at once, on a worker."""

    def __init__(self, clients: int, config: str, folder: Path, pool: Pool, seed: int) -> None:
        self._app, self._pool, self._random, self._sent = (
            make_client_app(lambda _: build_runtime(config), lambda _: folder),
            pool,
            random.Random(seed),
            0,
        )
        self._replies = dict[str, Message]()
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1  # without which Flower makes no message
        self._contexts = {i + 2: context_of(i, clients) for i in range(clients)}
        self.there = set(self._contexts)
        self.left = self.joined = 0

    def churn(self, share: float) -> None:
        """Some leave, and some of those that had left come back."""
        gone = set(self._contexts) - self.there
        leaving = {n for n in self.there if self._random.random() < share}
        coming = {n for n in gone if self._random.random() < 0.5}
        self.there = (self.there - leaving) | coming
        self.left, self.joined = self.left + len(leaving), self.joined + len(coming)

    def get_nodes(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(node_id=node, public_key=b"") for node in sorted(self.there)]

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Has every node answer; one that leaves in the meantime is said to be gone."""
        batch = list(messages)
        for message in batch:
            self._sent += 1
            message.metadata.__dict__["_message_id"] = f"n{self._sent}"  # which Flower's own grids do when they send it
        lost = {m.metadata.dst_node_id for m in batch if m.metadata.message_type == "train" and self._random.random() < 0.05}

        def answer(message: Message) -> Message:
            node = message.metadata.dst_node_id
            return Message(Error(5, GONE), reply_to=message) if node in lost else self._app(message, self._contexts[node])

        for reply, message in zip(self._pool.map(answer, batch), batch, strict=True):
            reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id
            self._replies[message.metadata.message_id] = reply
        return [message.metadata.message_id for message in batch]

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        """The replies, in any order."""
        replies = [self._replies.pop(name) for name in ids if name in self._replies]
        self._random.shuffle(replies)
        return replies


def crowd(rounds: int, share: float = 0.2) -> dict[str, Any]:
    """50 nodes, a fifth of which leaves each round."""
    options = resolve({**MANY, "dataset": str(dataset(6_000)), "clients": 50, "fraction": 1.0, "rounds": rounds, "engine": "flower",
                       "extract": "lotteryfl", "wait": 5})  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        pool = Pool()
        config = format_run_file(options.model_copy(update={"engine": "local", "out": None}))
        nodes = Crowd(50, config, Path(place) / "memory", pool, 0)

        class Watch(NoCallback):
            def done(self, row: dict[str, Any]) -> None:
                nodes.churn(share)

        summary = runner.run(options, RunFolder(Path(place) / "run").open(), Watch(), grid=nodes)  # type: ignore[arg-type]
        rows = (Path(place) / "run" / "clients.csv").read_text().splitlines()
    faults = [row for row in rows if "not connected" in row or GONE in row]
    forgotten = sum("memory of round" in row for row in rows)
    return {"rounds": summary["rounds"], "left": nodes.left, "came back": nodes.joined, "messages": len(rows) - 1,
            "left out": len(faults), "memories lost": forgotten, "peak MB": peak()}  # fmt: skip


def federation(rounds: int) -> dict[str, Any]:
    """Three SuperNodes on this machine with certificates and keys, a model of 6,090 parameters, evaluated in every round."""
    with tempfile.TemporaryDirectory() as place:
        out, began = Path(place) / "run", time.perf_counter()
        RunFolder(out).open().release()
        app = export(resolve({**SMALL, "rounds": rounds}), Path(place) / "app")
        with LocalFederation(Path(place) / "flower", 3, tls=True) as nodes:
            started = time.perf_counter() - began
            list(nodes.events(app, out))
            took = time.perf_counter() - began
        with open(out / "metrics.csv", newline="") as file:
            rows = list(csv.DictReader(file))[1:-1] or [{}]  # without the first, in which nodes load, and the last, which has more
    phases = ("profile", "extract", "fit", "aggregate", "evaluate")
    found = {name: statistics.median(float(row.get(f"seconds {name}", 0)) for row in rows) for name in phases}
    whole, own = (statistics.median(float(row.get(name, 0)) for row in rows) for name in ("seconds", "client seconds"))
    return {"start": started, "whole": took, "rounds": rounds, "seconds a round": whole, "the clients' own": own, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", choices=["many", "remembering", "crowd", "federation"])
    given = parser.parse_args()
    works = {
        "many": lambda: many(given.rounds, "heterofl"), "remembering": lambda: many(given.rounds, "lotteryfl"),
        "crowd": lambda: crowd(given.rounds), "federation": lambda: federation(given.rounds),
    }  # fmt: skip
    for work in works.values() if given.only is None else [works[given.only]]:
        print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in work().items()}), flush=True)


if __name__ == "__main__":
    main()
