"""Silver and gold: a run that is stopped goes on, engines and federations give the same bits; an oracle agrees."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import partial
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from hetfl import registry
from hetfl.hooks.base import Plugin
from hetfl.registry import Entry
from hetfl.rounds.loop import run_round
from hetfl.rounds.reporting import NoCallback
from hetfl.rounds.rows import Row
from hetfl.runs import runner
from hetfl.runs.folder import RunFolder
from hetfl.runs.result import Run
from hetfl.testing.bronze import expect_same
from hetfl.testing.checks import Tier, check
from hetfl.testing.probes import federate, group_clients
from hetfl.testing.subject import NotChecked, Oracle, Outcome, Subject, outcome


@check(Tier.SILVER)
def state_round_trips(subject: Subject) -> str:
    """A plugin that forgets all but its state_dict after round 2 goes on to the same bits."""
    with subject.start() as made:
        for number in (1, 2):
            run_round(made.state, number, made.engine)
        kept = 0
        for plugin in made.plugins.plugins.values():
            state = {name: tensor.clone() for name, tensor in plugin.state_dict().items()}
            forget(plugin)
            if state:
                plugin.load_state_dict(state)
            kept += len(state)
        run_round(made.state, 3, made.engine)
        expect_same(subject.baseline, outcome(made), "after its state went through state_dict")
    return f"{kept} tensors"


def forget(plugin: Plugin) -> None:
    """Makes a plugin as it is when a process begins: its options are all that it has."""
    plugin.__pydantic_private__ = type(plugin)(**plugin.model_dump()).__pydantic_private__


class Stopped(Exception):  # noqa: N818 (no error)
    """Ends a run after a round, as if its process had ended there."""


class StopAfter(NoCallback):
    """Stops a run when a round has ended."""

    def __init__(self, round: int) -> None:
        self.round = round

    def done(self, row: Row) -> None:
        if row["round"] == self.round:
            raise Stopped


@check(Tier.SILVER)
def resumes(subject: Subject) -> None:
    """A run that is stopped after rounds 1 and 2, and goes on from its folder, ends with the same bits."""
    with tempfile.TemporaryDirectory() as place:
        whole, part = (RunFolder(Path(place) / name) for name in ("whole", "part"))
        runner.run(subject.resolve(out=whole.path), whole.open(), NoCallback())
        with suppress(Stopped):
            runner.run(subject.resolve(out=part.path), part.open(), StopAfter(1))
        options = Run(part).options.model_copy(update={"out": part.path})
        with suppress(Stopped):
            runner.resume_run(options, part, StopAfter(2))
        runner.resume_run(options, part, NoCallback())
        expect_same(read(whole), read(part), "stopped and resumed")
        part.release()
        whole.release()


def read(folder: RunFolder) -> Outcome:
    """What the run in a folder came to."""
    run = Run(folder)
    rows = [] if run.clients.empty else run.clients.astype(object).where(run.clients.notna(), None).to_dict("records")
    timeless = [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]
    return Outcome(run.weights, timeless, [])


@check(Tier.SILVER)
def federation_changes_nothing(subject: Subject) -> None:
    """Clients with plugin objects of their own, which get and send encoded messages alone: the same bits."""
    expect_same(subject.baseline, subject.play(around=federate), "with the clients on nodes")


@check(Tier.SILVER)
def engines_change_nothing(subject: Subject) -> None:
    """Clients in processes of their own: the same bits."""
    there = Subject(subject.role, find_elsewhere(subject), {**subject.options, **settings(subject)})
    expect_same(there.play(2), there.play(2, engine="processes"), "on the engines local and processes")


@check(Tier.SILVER, "extract", "aggregate", "wrap")
def stacks_as_it_says(subject: Subject) -> None:
    """Where it says that clients may train as one model (`stackable`), each comes to what it comes to alone, up to rounding."""
    if not subject.kind.stackable:
        raise NotChecked("it does not say that clients may train as one (stackable)")
    faults: list[str] = []
    alone = subject.play(2, alpha=0.3, partition="dirichlet", levels="1,0.5,0.5")
    together = subject.play(
        2, partial(group_clients, faults=faults), alpha=0.3, partition="dirichlet", levels="1,0.5,0.5", vmap="on"
    )
    assert not faults, f"its clients did not train as one: {faults[0]}"
    apart = [name for name, t in alone.state.items() if not torch.allclose(together.state[name], t, rtol=1e-2, atol=1e-3)]
    assert not apart, f"trained as one, the model differs in {apart[0]}"


def find_elsewhere(subject: Subject) -> str:
    """A name by which another process finds the plugin; raises NotChecked where it has none."""
    if isinstance(subject.plugin, str):
        return subject.plugin
    kind = subject.kind
    found: Any = None
    if find_spec(kind.__module__.split(".")[0]) is not None and kind.__module__ != "__main__":
        try:
            found = getattr(importlib.import_module(kind.__module__), kind.__qualname__, None)
        except ImportError:
            found = None
    if found is not kind:
        raise NotChecked(f"other processes cannot import {kind.__module__}:{kind.__qualname__}; put it into a module")
    return f"{kind.__module__}:{kind.__qualname__}"


def settings(subject: Subject) -> dict[str, Any]:
    """The options of a configured object, for a run that names its class."""
    if not isinstance(subject.plugin, Plugin):
        return {}
    mine = subject.plugin.model_dump(mode="json", exclude_defaults=True)
    given = dict(subject.options.get("set", {}))
    return {"set": {**given, subject.role: {**given.get(subject.role, {}), type(subject.plugin).__name__: mine}}} if mine else {}


@check(Tier.GOLD)
def agrees_with_its_oracle(subject: Subject) -> str:
    """Numbers of its paper, or worked out by hand, come out."""
    oracles = [*subject.oracles, *find_oracles(subject)]
    if not oracles:
        raise NotChecked("no oracle was given: a function that raises AssertionError (--oracle, or entry point hetfl.oracle)")
    for oracle in oracles:
        run_oracle(oracle)
    return f"{len(oracles)} oracle" + "s" * (len(oracles) > 1)


def find_oracles(subject: Subject) -> list[Oracle]:
    """What registry.toml or the entry points of group hetfl.oracle name for this plugin."""
    if not isinstance(subject.plugin, str) or ":" in subject.plugin:
        return []
    entry: Entry = subject.entry
    points = [point for point in entry_points(group="hetfl.oracle") if point.name == entry.key]
    return [*([str(registry.PATH.parent / entry.oracle)] if entry.oracle else []), *(point.load() for point in points)]


def run_oracle(oracle: Oracle) -> None:
    """Calls a function, or runs a file of tests in a process of its own. Raises AssertionError or NotChecked."""
    if not isinstance(oracle, str):
        oracle()
        return
    if not Path(oracle.partition("::")[0]).exists() or find_spec("pytest") is None:
        raise NotChecked(f"its oracle is the test {Path(oracle).name} of hetfl's repository, which needs a checkout and pytest")
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", oracle]
    done = subprocess.run(words, capture_output=True, text=True, cwd=registry.PATH.parent)
    assert done.returncode == 0, f"{Path(oracle).name}: {' '.join(done.stdout.split()[-12:])}"
