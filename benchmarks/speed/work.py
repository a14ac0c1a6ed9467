"""The work that is timed: one federation, one model, one order of clients and batches for hetfl, the floor and the peers."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from hetfl.config import RunOptions
    from hetfl.data.dataset import FederatedDataset

SIZE = 28

CLASSES = 10

DEVICE = os.environ.get("HETFL_BENCH_DEVICE", "cpu")


@dataclass(frozen=True)
class Work:
    """`sampled` of `clients` train one epoch of `examples` examples a round, `rounds` times after one to warm up."""

    name: str
    model: str
    args: dict[str, Any] = field(default_factory=dict)
    clients: int = 100
    sampled: int = 10
    examples: int = 600
    batch: int = 32
    momentum: float = 0.0
    clip: float = 0.0
    rounds: int = 2
    data: str = ""  # a data set of its own, in place of noise
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """The options of `hfl run`."""
        return {
            "extract": "full", "aggregate": "fedavg", "dataset": self.data or str(dataset(self.clients * self.examples)),
            "partition": "iid", "clients": self.clients, "fraction": self.sampled / self.clients, "own_test": 0, "server_data": 0,
            "epochs": 1, "batch_size": self.batch, "lr": 0.01, "momentum": self.momentum, "clip": self.clip, "model": self.model,
            "model_args": self.args, "levels": "1:1", "rounds": self.rounds + 1, "eval_every": 1000, **self.more,
            "device": DEVICE, **json.loads(os.environ.get("HETFL_BENCH_MORE", "{}")),
        }  # fmt: skip

    @cached_property
    def options(self) -> RunOptions:
        from hetfl.config import resolve

        return resolve(self.values)

    @cached_property
    def federation(self) -> FederatedDataset:
        from hetfl.data import loading as data

        return data.load(self.options).on(DEVICE)

    @property
    def evaluates(self) -> bool:
        """Whether a round ends with normalisation statistics and tests."""
        return self.options.eval_every == 1

    @cached_property
    def ratios(self) -> list[float]:
        """The clients' width ratios."""
        mix = [part.split(":") for part in self.values["levels"].split(",")]
        return [float(level) for level, count in mix for _ in range(int(count) * (self.clients if len(mix) == 1 else 1))]

    def ratio(self, client: int) -> float:
        """A client's width ratio."""
        return self.ratios[client]

    @property
    def mixed(self) -> bool:
        """Whether clients train submodels."""
        return min(self.ratios) < 1

    def module(self, ratio: float = 1.0) -> torch.nn.Module:
        """The untrained model, as hetfl builds it; with a `ratio` below 1 one whose layers have so much of their channels."""
        from hetfl.rounds.setup import build_model

        sizes = {"widths": (64, 128, 256, 512), **self.args} if ratio < 1 else {}
        narrow = {name: [max(1, int(n * ratio)) for n in given] for name, given in sizes.items() if name in ("widths", "hidden")}
        options = self.options.model_copy(update={"model_args": {**self.args, **narrow}})
        return build_model(options, self.federation, self.model)

    def chosen(self, round: int) -> list[int]:
        """The clients of a round, as hetfl samples them."""
        import torch

        from hetfl.rng import stream
        from hetfl.rounds.assignment import sample_size

        order = torch.randperm(self.clients, generator=stream(0, "sample", round))
        return sorted(order[: sample_size(self.clients, self.options.fraction)].tolist())

    def rows(self, round: int, client: int) -> torch.Tensor:
        """A client's examples in the order in which it sees them."""
        import torch

        from hetfl.rng import stream

        index = self.federation.clients[client].train.index
        return index[torch.randperm(len(index), generator=stream(0, "batches", round, client))]

    def batches(self, round: int, client: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        train = self.federation.clients[client].train
        for rows in self.rows(round, client).to(DEVICE).split(self.batch):
            yield train.x[rows], train.y[rows]


MNIST = Path(os.environ.get("HETFL_DATA") or Path(__file__).parents[3] / "shared" / "data") / "mnist"  # where it is not, the Hub's

SMALL = {"widths": [16, 32], "hidden": 128, "kernel": 3}

LENET = {"widths": [8, 16], "hidden": [120, 84]}

QUARTERS = {"extract": "heterofl", "aggregate": "overlap", "levels": "1:2,0.75:2,0.5:2,0.25:2"}

HETERO = {
    "extract": "heterofl", "aggregate": "overlap", "levels": "1:2,0.5:2,0.25:2,0.125:2,0.0625:2", "eval_every": 1,
    "norm_policy": "static-slices",
}  # fmt: skip

WORKS = {
    work.name: work
    for work in (
        Work("W", "fedavg-cnn"),
        Work("W-small", "fedavg-cnn", SMALL),
        Work("W-1000", "fedavg-cnn", clients=1000, sampled=1000, examples=32, rounds=1),
        *(Work(f"tiny-{n}", "mlp", {"hidden": []}, 1000, n, 32, rounds=3) for n in (10, 100, 1000)),
        Work("hetero", "cnn", {}, 10, 10, 600, momentum=0.9, clip=1.0, rounds=2, more=HETERO),
        Work("resnet", "resnet18", {}, 10, 10, 600),
        Work("heflwr", "fedavg-cnn", LENET, 8, 8, 7500, 64, data=str(MNIST) if MNIST.exists() else "mnist", more=QUARTERS),
    )
}


def dataset(examples: int, tests: int = 1000) -> Path:
    """A folder of MNIST-shaped noise, made once."""
    folder = Path(os.environ.get("HETFL_BENCH", "/tmp/hetfl-bench")) / f"noise{examples}"
    if not (folder / "test.npz").exists():
        folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)
        for name, count in (("train", examples), ("test", tests)):
            y = np.arange(count) % CLASSES
            x = random.integers(0, 256, (count, SIZE, SIZE), dtype=np.uint8)
            x[np.arange(count), y * 2] |= 128  # something to learn
            np.savez(folder / f"{name}.npz", x=x, y=y)
    return folder


def cut(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The leading block of `whole` in the shape of `like`."""
    for dim, size in enumerate(like.shape):
        whole = whole.narrow(dim, 0, size)
    return whole


def norm(tensors: Any) -> float:
    """What two ways of computing the same have in common: the Euclidean norm of all parameters."""
    return float(sum(float(t.double().pow(2).sum()) for t in tensors) ** 0.5)


def report(**facts: Any) -> None:
    """The one line that compare.py reads."""
    print("RESULT " + json.dumps({"at": time.time(), **held_on_gpu(), **facts}), flush=True)


def wait() -> None:
    """Waits for what the GPU has to do, if there is one in use."""
    if DEVICE != "cpu":
        import torch

        torch.cuda.synchronize()


def held_on_gpu() -> dict[str, int]:
    """The most bytes that this process has held on the GPU."""
    if DEVICE == "cpu":
        return {}
    import torch

    return {"gpu": torch.cuda.max_memory_allocated()}


def plain() -> bool:
    """Whether the peers are to train as their tutorials do (torch's default layout and SGD), not with the floor's loop."""
    return "plain" in sys.argv or os.environ.get("HETFL_LOOP") == "plain"


def named(name: str) -> Work:
    """The work of this name; a GPU does it in `HETFL_BENCH_ROUNDS` rounds."""
    work = WORKS[name]
    return replace(work, rounds=int(os.environ.get("HETFL_BENCH_ROUNDS", work.rounds)))


def asked() -> Work:
    return named(sys.argv[1])


def key(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
