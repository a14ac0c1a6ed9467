"""Captures the state of a run between two rounds for a checkpoint, and restores it to one that goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hetfl.errors import RunError
from hetfl.hooks.values import Client
from hetfl.models.state import State
from hetfl.profiling.node import Profile
from hetfl.rounds.rows import ROUND
from hetfl.rounds.state import RunState
from hetfl.runs.checkpoint import Snapshot
from hetfl.runs.experiment import Experiment
from hetfl.submodel.blocks import Index
from hetfl.submodel.plan import Patch, Patches


def capture(experiment: Experiment, rounds: dict[str, Any]) -> Snapshot:
    """The run as it is now, between two rounds; `rounds` has the rows of the finished rounds and grows by those that are new."""
    run, server = experiment.state, experiment.server
    append_rounds(run, rounds)
    tensors = {"pretrained": experiment.pretrained, "server": server.state, "control": run.control, "initial": run.initial}
    tensors |= {f"branch/{name}": flatten_patches(patches) for name, patches in server.branches.items()}
    tensors |= {f"plugin/{key}": plugin.state_dict() for key, plugin in experiment.plugins.plugins.items()}
    tensors |= {f"extras/{client}": extras for client, extras in run.extras.items() if extras}
    for client, state in experiment.engine.client_states().items():
        tensors |= {f"client/{client}/{name}": named for name, named in state.items()}
    return Snapshot(len(run.rows), tensors, {"run": facts(experiment), **rounds})


def append_rounds(run: RunState, rounds: dict[str, Any]) -> None:
    """Adds the rounds that `rounds` does not have: each with its row and those of its clients."""
    new = {row[ROUND]: (row, list[Any]()) for row in run.rows[len(rounds) :]}
    for row in reversed(run.client_rows):
        if row[ROUND] not in new:
            break
        new[row[ROUND]][1].insert(0, row)
    rounds.update({f"round/{number}": list(rows) for number, rows in new.items()})


def facts(experiment: Experiment) -> dict[str, Any]:
    """What JSON can say of the run."""
    run, server = experiment.state, experiment.server
    return {
        "steps": [list(server.taken.items()), server.steps_saved, server.epochs_saved], "notes": list(server.notes),
        "clients": {str(c.id): [c.profile.width, c.profile.bottleneck, c.last_round] for c in server.clients.values()},
        "last round": {str(client): number for client, number in run.last_round.items()},
        "state versions": {str(client): number for client, number in run.state_versions.items()},
        "data": experiment.federation.fingerprint,
    }  # fmt: skip


def restore(experiment: Experiment, snapshot: Snapshot) -> None:
    """Makes the run what it was at `snapshot`. Raises RunError where the data are others."""
    run, server, known = experiment.state, experiment.server, snapshot.facts["run"]
    if known["data"] != experiment.federation.fingerprint:
        raise RunError("the data are not those that this run began with, so it cannot go on")
    server.state, run.control, run.initial = (snapshot.tensors[name] for name in ("server", "control", "initial"))
    server.branches = {name: unflatten_patches(tensors) for name, tensors in of_kind(snapshot.tensors, "branch").items()}
    taken, server.steps_saved, server.epochs_saved = known["steps"]
    server.taken = Counter(dict(taken))
    server.notes = known["notes"]
    run.extras = {int(client): extras for client, extras in of_kind(snapshot.tensors, "extras").items()}
    run.state_versions = {int(client): number for client, number in known["state versions"].items()}
    run.last_round = {int(client): number for client, number in known["last round"].items()}
    for key, (width, bottleneck, last_round) in known["clients"].items():
        client = int(key)
        server.clients[client] = Client(client, Profile(width, bottleneck), run.extras.get(client, {}), last_round)
    for number in range(1, snapshot.round + 1):
        row, people = snapshot.facts[f"round/{number}"]
        run.rows.append(row)
        run.client_rows += people
    for key, plugin in experiment.plugins.plugins.items():
        if state := snapshot.tensors[f"plugin/{key}"]:
            plugin.load_state_dict(state)
    states: dict[int, dict[str, State]] = {}
    for key, tensors in of_kind(snapshot.tensors, "client").items():
        owner, name = key.split("/", 1)
        states.setdefault(int(owner), {})[name] = tensors
    experiment.engine.restore_client_states(states)


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
