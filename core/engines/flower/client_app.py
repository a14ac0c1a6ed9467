"""The ClientApp half of an exported app: what a node has of its own, and what it allows."""

from __future__ import annotations

import functools
import itertools
import json
import os
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.clientapp import ClientApp

from hetfl import registry
from hetfl.config import RunOptions, resolve
from hetfl.data import loading as data
from hetfl.data.dataset import ClientData, FederatedDataset
from hetfl.engines.flower.manifest import OUTLINE, RUN, make_mods
from hetfl.engines.flower.node import make_client_app
from hetfl.engines.flower.records import RecordCodec
from hetfl.errors import UsageError
from hetfl.models.frozen import refuse_other_base
from hetfl.rounds.client import ClientRuntime
from hetfl.rounds.setup import build_node_setup
from hetfl.submodel import serialization


def client_app(home: Path) -> ClientApp:
    """The ClientApp of the app in folder `home`. What a node has of its own is in its node config:

    `partition-id`, `num-partitions`; `data`, a folder of its own examples (default: its part of the run's data set); `memory`, the
    folder in which its client's state is kept; `allow`, plugins and models beside the built-in ones that it will load, with commas.
    """
    outline = json.loads((home / OUTLINE).read_text())

    def find_folder(context: Context) -> Path:
        return Path(str(context.node_config.get("memory") or default_folder())) / str(outline["key"])

    def find_runtime(context: Context) -> ClientRuntime:
        given = {name: str(context.node_config.get(name, "")) for name in ("data", "allow", "num-partitions", "partition-id")}
        return build_node_runtime(home, (home / RUN).read_text(), json.dumps(given))

    return make_client_app(find_runtime, find_folder, make_mods(outline["mods"]))


def default_folder() -> Path:
    return Path(os.environ.get("FLWR_HOME", Path.home() / ".flwr")) / "hetfl"


@functools.cache
def build_node_runtime(home: Path, config: str, node: str) -> ClientRuntime:
    """What the client of a node has at hand, once a process. Raises UsageError for what the node does not allow."""
    torch.set_num_threads(1)
    options, own = resolve(tomllib.loads(config)), json.loads(node)
    refuse_not_allowed(options, [part.strip() for part in own["allow"].split(",")], home)
    outline = json.loads((home / OUTLINE).read_text())
    federation = node_data(options, own["data"], int(own["partition-id"]), int(own["num-partitions"]))
    if list(federation.classes) != outline["classes"]:
        raise UsageError(f"this node's data have the classes {', '.join(federation.classes)}, not {', '.join(outline['classes'])}")
    setup = build_node_setup(options, federation, serialization.from_json(outline["widths"]))
    refuse_other_base(setup.builder.base_hash, outline["base"])
    return setup.runtime(RecordCodec().pack)


def refuse_not_allowed(options: RunOptions, allowed: Sequence[str], home: Path) -> None:
    """Raises UsageError for plugins and models that are neither built in nor allowed here; before any is imported."""
    for entry in registry.choose_entries(options):
        if entry.source != registry.BUILT_IN and not entry.grants & set(allowed):
            raise UsageError(f"this node does not allow the {entry.role} plugin '{entry.name}' of {entry.source} (--allow)")
    if options.model and not is_allowed(options.model, allowed, home):
        raise UsageError(f"this node does not allow the model '{options.model}' (--allow)")


def is_allowed(model: str, allowed: Sequence[str], home: Path) -> bool:
    """Whether a node builds the model `model`: of the zoo, within the app itself, or allowed by its module or library."""
    module, colon, _ = model.partition(":")
    path = home / Path(*module.split("."))
    inside = path.with_suffix(".py").exists() or (path / "__init__.py").exists()
    return not colon or inside or module in allowed or module.split(".")[0] in allowed or model in allowed


class SameForAll(Sequence[ClientData]):
    """The clients as one of them sees them: all have what it has."""

    def __init__(self, own: ClientData, clients: int) -> None:
        self._own, self._clients = own, clients

    def __len__(self) -> int:
        return self._clients

    def __getitem__(self, client: Any) -> Any:
        return self._own

    def __iter__(self) -> Iterator[ClientData]:
        return itertools.repeat(self._own, self._clients)


def node_data(options: RunOptions, folder: str, client: int, clients: int) -> FederatedDataset:
    """The data of a node: those in `folder`, or its part of the run's data set."""
    if not folder:
        return data.load(options)
    mine = {"dataset": folder, "clients": 1, "partition": "iid", "server_data": 0.0, "limit": None}
    found = data.load(options.model_copy(update=mine))
    return replace(found, clients=SameForAll(found.clients[client if client < len(found.clients) else 0], clients))  # type: ignore[arg-type]
