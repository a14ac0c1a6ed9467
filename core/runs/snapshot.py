"""Captures the state of a run between two rounds for a checkpoint, and restores it to one that goes on."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

from hetfl.aggregation.updates import Update
from hetfl.config import RunOptions, format_run_file, resolve
from hetfl.errors import RunError, foreign
from hetfl.hooks.answers import say_key
from hetfl.hooks.base import Plugin
from hetfl.hooks.server import Server
from hetfl.hooks.values import Client
from hetfl.models.state import State
from hetfl.profiling.node import Profile
from hetfl.rounds.rows import RESERVED, ClientRow
from hetfl.rounds.state import RunState, Underway
from hetfl.runs.checkpoint import Snapshot
from hetfl.runs.experiment import Experiment
from hetfl.runs.versions import BITS, version
from hetfl.submodel.blocks import Index
from hetfl.submodel.plan import Patch, Patches

HARMLESS = {  # change no result
    "out", "overwrite", "workers", "wait", "timeout", "checkpoint_every", "keep_checkpoints", "ray_address", "client_gpus"
}  # fmt: skip


def capture(experiment: Experiment) -> Snapshot:
    """The run as it is now, between two rounds."""
    run, server = experiment.state, experiment.server
    tensors = {"pretrained": experiment.pretrained, "server": server.state, "control": run.control, "initial": run.initial}
    tensors["secret"] = {"key": torch.frombuffer(bytearray(server.key), dtype=torch.uint8)}
    tensors |= {f"branch/{name}": flatten_patches(patches) for name, patches in server.branches.items()}
    tensors |= {f"plugin/{key}": ask_state(key, plugin) for key, plugin in experiment.plugins.plugins.items()}
    tensors |= {f"extras/{client}": extras for client, extras in run.extras.items() if extras}
    for client, late in run.underway.items():
        tensors |= {f"underway/{client}": flatten_patches(late.update.patches), f"underway extras/{client}": late.update.extras}
    for client, state in experiment.engine.client_states().items():
        tensors |= {f"client/{client}/{name}": named for name, named in state.items()}
    return Snapshot(run.history.rounds, tensors, {"run": facts(experiment)})


def describe_changes(snapshot: Snapshot, options: RunOptions) -> list[str]:
    """What is not as it was when the run began and changes its result: options, and the packages that compute."""
    now, versions = identity(options), {name: version(name) for name in BITS}
    with foreign(f"the checkpoint after round {snapshot.round}"):
        then, was = snapshot.facts["run"]["options"], snapshot.facts["run"]["versions"]
        changed = [
            f"{name} is {now.get(name)!r}, it was {then.get(name)!r}" for name in {**then, **now} if then.get(name) != now.get(name)
        ]
        return changed + [f"{name} is {versions[name]}, it was {was[name]}" for name in BITS if versions[name] != was[name]]


def identity(options: RunOptions) -> dict[str, Any]:
    """The options that a run's result depends on, as JSON."""
    return cast(dict[str, Any], json.loads(options.model_dump_json(exclude=HARMLESS)))


def facts(experiment: Experiment) -> dict[str, Any]:
    """What JSON can say of the run."""
    run, server = experiment.state, experiment.server
    return {
        "steps": [list(server.taken.items()), server.steps_saved, server.epochs_saved], "notes": list(server.notes),
        "unsaid": run.unsaid,
        "clients": {str(c.id): [c.profile.width, c.profile.bottleneck, c.last_round] for c in server.clients.values()},
        "last round": {str(client): number for client, number in run.last_round.items()},
        "state versions": {str(client): number for client, number in run.state_versions.items()},
        "under way": {
            str(client): [late.update.weight, late.round, late.arrives, asdict(late.row), sorted(late.moved), late.more]
            for client, late in run.underway.items()
        },
        "data": experiment.federation.fingerprint, "base": server.builder.base_hash,
        "versions": {name: version(name) for name in BITS}, "cpu": torch.backends.cpu.get_cpu_capability(),
        "options": identity(resolve(tomllib.loads(format_run_file(experiment.options, experiment.plugins.options())))),
    }  # fmt: skip


def restore(experiment: Experiment, snapshot: Snapshot) -> None:
    """Makes the run what it was at `snapshot`. Raises RunError where the data or the plugins are others."""
    with foreign(f"the checkpoint after round {snapshot.round}"):
        refuse_another_run(experiment, snapshot)
        restore_server(experiment.server, snapshot)
        restore_state(experiment.state, snapshot)
        for key, plugin in experiment.plugins.plugins.items():
            give_state(key, plugin, snapshot.tensors[f"plugin/{key}"])
        experiment.engine.restore_client_states(read_client_states(snapshot))


def refuse_another_run(experiment: Experiment, snapshot: Snapshot) -> None:
    """Raises RunError where a snapshot is of other data, of another model or base, or has nothing of a plugin of this run."""
    known = snapshot.facts["run"]
    if known["data"] != experiment.federation.fingerprint:
        raise RunError("the data are not those that this run began with, so it cannot go on")
    if known["base"] != experiment.server.builder.base_hash:
        raise RunError("the frozen base of the model is not the one that this run began with, so it cannot go on")
    if strangers := [key for key in experiment.plugins.plugins if f"plugin/{key}" not in snapshot.tensors]:
        raise RunError(f"the run has nothing that {strangers[0]} could go on from: it began with other plugins")
    if snapshot.tensors["server"].keys() != experiment.initial.keys():
        raise RunError("the model is not the one that this run began with, so it cannot go on")


def restore_server(server: Server, snapshot: Snapshot) -> None:
    """The global model and the branches, the secret, the steps taken, the notes, and what is known of each client."""
    tensors, known = snapshot.tensors, snapshot.facts["run"]
    server.state, server.key = tensors["server"], bytes(tensors["secret"]["key"].tolist())
    server.branches = {name: unflatten_patches(patches) for name, patches in of_kind(tensors, "branch").items()}
    taken, server.steps_saved, server.epochs_saved = known["steps"]
    server.taken = Counter(dict(taken))
    server.notes = known["notes"]
    if known["cpu"] != (cpu := torch.backends.cpu.get_cpu_capability()):
        server.notes.append(
            f"went on after round {snapshot.round} with other instructions of the CPU ({cpu}, they were {known['cpu']}): last "
            "digits differ from those of a run that was not stopped"
        )
    extras = of_kind(tensors, "extras")
    for key, (width, bottleneck, last_round) in known["clients"].items():
        server.clients[int(key)] = Client(int(key), Profile(width, bottleneck), extras.get(key, {}), last_round)


def restore_state(run: RunState, snapshot: Snapshot) -> None:
    """The control, who took part when and with what, the rows of finished rounds, and the updates that wait for a later merge."""
    tensors, known = snapshot.tensors, snapshot.facts["run"]
    run.control, run.initial, run.unsaid = tensors["control"], tensors["initial"], known["unsaid"]
    run.extras = {int(client): extras for client, extras in of_kind(tensors, "extras").items()}
    run.state_versions = {int(client): number for client, number in known["state versions"].items()}
    run.last_round = {int(client): number for client, number in known["last round"].items()}
    for row, people in snapshot.rounds:
        run.watch.look(row, people)
        run.history.add(row, people)
    if run.clock is not None:
        run.clock.set(run.history.last)
    run.underway = {int(key): restore_underway(key, given, tensors) for key, given in known["under way"].items()}
    run.metric_names = run.history.metrics.union(*(late.row.metrics for late in run.underway.values())) - RESERVED


def read_client_states(snapshot: Snapshot) -> dict[int, dict[str, State]]:
    """What stays with each client, its tensors by what they are for."""
    states: dict[int, dict[str, State]] = {}
    for key, tensors in of_kind(snapshot.tensors, "client").items():
        client, name = key.split("/", 1)
        states.setdefault(int(client), {})[name] = tensors
    return states


def restore_underway(client: str, known: Sequence[Any], tensors: Mapping[str, State]) -> Underway:
    """The update of a client that waits for a later merge, of what `facts` and `capture` say of it."""
    weight, round, arrives, row, moved, more = known
    update = Update(int(client), unflatten_patches(tensors[f"underway/{client}"]), weight, tensors[f"underway extras/{client}"])
    return Underway(update, round, arrives, ClientRow(**row), frozenset(moved), more)


def ask_state(key: str, plugin: Plugin) -> State:
    """What a plugin needs to go on. Raises RunError, which names it, for what is not named tensors."""
    state = plugin.state_dict()
    if isinstance(state, Mapping) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in state.items()):
        return dict(state)
    raise RunError(f"{say_key(key)} answered what is not tensors by name (state_dict)")


def give_state(key: str, plugin: Plugin, state: State) -> None:
    """Has a plugin go on from what it said, where that is anything. Raises RunError, which names it, where it cannot."""
    try:
        if state:
            plugin.load_state_dict(state)
    except Exception as error:
        raise RunError(f"{say_key(key)} failed in load_state_dict: {type(error).__name__}: {error}") from error


def flatten_patches(patches: Patches) -> State:
    """A branch as named tensors."""
    found: State = {}
    for name, patch in patches.items():
        found[f"values/{name}"] = patch.values
        found |= {f"index {dim}/{name}": where for dim, where in patch.index.items()}
        found |= {} if patch.coverage is None else {f"coverage/{name}": patch.coverage}
    return found


def unflatten_patches(tensors: State) -> dict[str, Patch]:
    """The inverse of `flatten_patches`."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        parts.setdefault(name, {})[kind] = tensor
    return {name: Patch(of["values"], Index(read_index(of)), of.get("coverage")) for name, of in parts.items()}


def read_index(parts: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """The positions of a patch by dim."""
    return {int(kind.split()[1]): where for kind, where in parts.items() if kind.startswith("index ")}


def of_kind(groups: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The groups of one kind by the rest of their names."""
    return {name.removeprefix(kind + "/"): group for name, group in groups.items() if name.startswith(kind + "/")}
