"""A plugin under test, and small runs of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hetfl import registry
from hetfl.config import RunOptions, merge_options, resolve
from hetfl.hooks.base import Plugin
from hetfl.hooks.loading import load_class
from hetfl.hooks.values import Client
from hetfl.models.state import State
from hetfl.profiling.node import Profile
from hetfl.registry import Entry
from hetfl.rounds.loop import run_round
from hetfl.rounds.messages import Engine
from hetfl.rounds.reporting import NoCallback
from hetfl.runs.experiment import Experiment, prepare
from hetfl.runs.given import Given
from hetfl.submodel.plan import Plan

SMALL = {
    "limit": 120, "clients": 3, "batch_size": 32, "rounds": 3, "epochs": 1, "pretrain_steps": 5, "partition": "iid", "workers": 2,
    "model": "mlp", "model_args": {"hidden": [8, 6]}, "levels": "1,0.5,0.25", "control": False, "vmap": "off",
}  # fmt: skip

RESIDUAL = {"model": "preresnet18", "model_args": {"widths": [4], "blocks": [3]}}

WIDTHS = (1.0, 0.5, 0.25)

Oracle = Callable[[], None] | str  # a function that raises AssertionError, or a file of tests


class NotChecked(Exception):  # noqa: N818 (no error: an answer)
    """A check says nothing of this plugin; the text is the reason."""


@dataclass(frozen=True, eq=False)
class Subject:
    """The plugin under test.

    `plugin`: what `hetfl.run` takes, a name, "package.module:Class", a class or an object. `options` of the run, over SMALL;
    `oracles`: its numbers from elsewhere, as functions or files of tests; `seconds` that a client's round may take at most.
    """

    role: str
    plugin: Plugin | type[Plugin] | str
    options: Mapping[str, Any] = field(default_factory=dict)
    oracles: Sequence[Oracle] = ()
    seconds: float = 5.0
    _given: Given = field(default_factory=Given)

    @property
    def kind(self) -> type[Plugin]:
        """The plugin's class."""
        if isinstance(self.plugin, str):
            return load_class(self.entry)
        return self.plugin if isinstance(self.plugin, type) else type(self.plugin)

    @property
    def entry(self) -> Entry:
        """The plugin as the registry knows it."""
        assert isinstance(self.plugin, str)
        return registry.find(self.role, self.plugin)

    def resolve(self, **values: Any) -> RunOptions:
        """The options of a small run with the plugin in it."""
        small = {**SMALL, **({"levels": None} if self.role == "profile" else {})}
        chosen = {self.role: [*values.pop("wrap", ()), self.plugin]} if self.role == "wrap" else {self.role: self.plugin}
        partner = "heterofl"
        if isinstance(self.plugin, str) and self.entry.adapter:
            small, partner = {**small, "adapter": "lora:rank=8"}, "loraranks"
        if isinstance(self.plugin, str) and self.entry.blocks:
            small, partner = {**small, **RESIDUAL}, "inclusivefl"
        given = {"extract": partner, **merge_options(merge_options(small, self.options), values), **chosen}
        return resolve({name: value for name, value in self._given.names(given).items() if value is not None})

    @contextmanager
    def start(self, **values: Any) -> Iterator[Experiment]:
        """A run before round 1."""
        made = prepare(self.resolve(**values), NoCallback())
        try:
            yield made
        finally:
            made.close()

    def play(self, rounds: int = 3, around: Callable[[Experiment], Engine] | None = None, **values: Any) -> Outcome:
        """What `rounds` rounds come to, on the engine that `around` makes of the run where it is given."""
        with self.start(rounds=rounds, **values) as made:
            engine = around(made) if around else made.engine
            for number in range(1, rounds + 1):
                run_round(made.state, number, engine)
            return outcome(made)

    @cached_property
    def baseline(self) -> Outcome:
        """What three rounds come to, played once: what other ways to play them are compared with."""
        return self.play()

    @contextmanager
    def plans(self, widths: Sequence[float] = WIDTHS) -> Iterator[tuple[Experiment, dict[float, Plan]]]:
        """The plans of round 1 for clients of these widths that train a part of the run's model; raises NotChecked without one."""
        with self.start(clients=len(widths)) as made:
            clients = [Client(i, Profile(width)) for i, width in enumerate(widths)]
            made.server.clients |= {client.id: client for client in clients}
            found = made.plugins.extract(made.server, clients, 1)
            plans = {w: plan for w, plan in zip(widths, found, strict=True) if plan is not None and plan.model is None}
            if not plans:
                raise NotChecked("no client trains a part of the run's model")
            yield made, plans


@dataclass(frozen=True, eq=False)
class Outcome:
    """What rounds came to: the global model and its branches, a line for each client and round, and what was said."""

    state: State
    clients: list[dict[str, Any]]
    left_out: list[str]

    def difference(self, other: Outcome) -> str:
        """Where `other` is not the same to the bit, in words; nothing where it is."""
        if differs := differing(self.state, other.state):
            return f"the model differs in {differs}"
        nothing: dict[str, Any] = {}
        pairs = itertools.zip_longest(self.clients, other.clients, fillvalue=nothing)
        odd = [(a, b) for a, b in pairs if a != b]
        return f"the clients' lines differ: {odd[0][0]} and {odd[0][1]}" if odd else ""


def outcome(made: Experiment) -> Outcome:
    """What a run has come to by now."""
    branches = {f"{name}/{n}": patch.values for name, patches in made.server.branches.items() for n, patch in patches.items()}
    rows = [{k: v for k, v in row.items() if "seconds" not in k and k != "traceback"} for row in made.state.client_rows]
    left_out = [f"client {row['client']} in round {row['round']}: {row['fault']}" for row in rows if "fault" in row]
    return Outcome({name: t.clone() for name, t in {**made.server.state, **branches}.items()}, rows, left_out)


def differing(a: State, b: State) -> str:
    """The first tensor in which two states differ in name, type or a bit; nothing where they are the same."""
    if a.keys() != b.keys():
        return ", ".join(sorted(a.keys() ^ b.keys())[:3])
    return next((name for name in a if not same_bits(a[name], b[name])), "")


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal in type, shape and every entry; NaN is equal to NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all()) if a.is_floating_point() else torch.equal(a, b)
