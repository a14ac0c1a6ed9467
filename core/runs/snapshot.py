"""What a run is between two rounds: taken for a checkpoint, and given back to one that goes on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from torch import Tensor

from hetfl.errors import RunError
from hetfl.hooks.values import Client
from hetfl.models.state import State
from hetfl.profiling.node import Profile
from hetfl.runs.checkpoint import Snapshot
from hetfl.submodel.blocks import Index
from hetfl.submodel.plan import Patch, Patches

if TYPE_CHECKING:
    from hetfl.hooks.server import Server
    from hetfl.rounds.loop import Rounds
    from hetfl.runs.experiment import Experiment

RECORDS: dict[str, Any] = {"ConfigRecord": ConfigRecord, "MetricRecord": MetricRecord}

Past = dict[str, Any]


def capture(experiment: Experiment, past: Past) -> Snapshot:
    """The run as it is now, between two rounds; `past` has the finished rounds and grows by those that are new."""
    rounds, server = experiment.rounds, experiment.server
    append_rounds(rounds, past)
    moment = Snapshot(
        len(rounds.rows), {"pretrained": experiment.pretrained, **models(rounds, server)}, {"server": facts(experiment), **past}
    )
    for key, plugin in experiment.plugins.plugins.items():
        moment.tensors[f"plugin/{key}"] = plugin.state_dict()
    moment.tensors |= {f"extras/{client}": extras for client, extras in rounds.extras.items() if extras}
    for client, context in experiment.grid.contexts().items():
        add_client_state(moment, client, context)
    return moment


def append_rounds(rounds: Rounds, past: Past) -> None:
    """Adds the rounds that `past` does not have: each with its row and those of its clients."""
    new = {row["round"]: (row, list[Any]()) for row in rounds.rows[len(past) :]}
    for row in reversed(rounds.client_rows):
        if row["round"] not in new:
            break
        new[row["round"]][1].insert(0, row)
    past.update({f"round/{round}": list(rows) for round, rows in new.items()})


def models(rounds: Rounds, server: Server) -> dict[str, State]:
    branches = {f"branch/{name}": flatten_patches(patches) for name, patches in server.branches.items()}
    return {"server": server.state, "control": rounds.control, "first": rounds.first, **branches}


def facts(experiment: Experiment) -> dict[str, Any]:
    rounds, server = experiment.rounds, experiment.server
    clients = {str(c.id): [c.profile.width, c.profile.bottleneck, c.last_round] for c in server.clients.values()}
    return {
        "spent": list(server.spent), "saved": list(server.saved), "notes": list(server.notes), "clients": clients,
        "met": {str(client): round for client, round in rounds.last_round.items()}, "data": experiment.federation.fingerprint,
        "remembers": {str(client): round for client, round in rounds.remembers.items()},
    }  # fmt: skip


def add_client_state(moment: Snapshot, client: int, context: Context) -> None:
    """Adds what a client remembers."""
    for name, record in context.state.items():
        if isinstance(record, ArrayRecord):
            moment.tensors[f"client/{client}/{name}"] = record_tensors(record)
        else:
            values = {key: {"hex": v.hex()} if isinstance(v, bytes) else v for key, v in record.items()}
            moment.facts[f"client/{client}/{name}"] = [type(record).__name__, values]


def record_tensors(record: ArrayRecord) -> State:
    """A record's tensors, the same ones each time: so that a checkpoint sees that nothing has changed."""
    known = record.__dict__.get("_hetfl_tensors")
    if known is None:
        known = record.__dict__["_hetfl_tensors"] = record.to_torch_state_dict()
    return dict(known)


def flatten_patches(patches: Patches) -> State:
    """A branch as named tensors."""
    found: State = {}
    for name, patch in patches.items():
        found[f"values/{name}"] = patch.values
        found |= {f"index {dim}/{name}": where for dim, where in patch.index.items()}
        found |= {} if patch.coverage is None else {f"coverage/{name}": patch.coverage}
    return found


def unflatten_patches(tensors: State) -> dict[str, Patch]:
    """The inverse of `flat`."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, name = key.split("/", 1)
        parts.setdefault(name, {})[kind] = tensor
    return {name: Patch(of["values"], Index(index(of)), of.get("coverage")) for name, of in parts.items()}


def index(parts: Mapping[str, Tensor]) -> dict[int, Tensor]:
    return {int(kind.split()[1]): where for kind, where in parts.items() if kind.startswith("index ")}


def restore(experiment: Experiment, moment: Snapshot) -> None:
    """Makes the run what it was at `moment`."""
    rounds, server, said = experiment.rounds, experiment.server, moment.facts["server"]
    if said["data"] != experiment.federation.fingerprint:
        raise RunError("the data are not those that this run began with, so it cannot go on")
    server.state, rounds.control, rounds.first = (moment.tensors[name] for name in ("server", "control", "first"))
    server.branches = {name: unflatten_patches(tensors) for name, tensors in under(moment.tensors, "branch").items()}
    server.spent, server.saved, server.notes = said["spent"], [(s, e) for s, e in said["saved"]], said["notes"]
    rounds.extras = {int(client): extras for client, extras in under(moment.tensors, "extras").items()}
    rounds.remembers = {int(client): round for client, round in said["remembers"].items()}
    rounds.last_round = {int(client): round for client, round in said["met"].items()}
    for key, (width, binding, met) in said["clients"].items():
        server.clients[int(key)] = Client(int(key), Profile(width, binding), rounds.extras.get(int(key), {}), met)
    for round in range(1, moment.round + 1):
        row, people = moment.facts[f"round/{round}"]
        rounds.rows.append(row)
        rounds.client_rows += people
    for key, plugin in experiment.plugins.plugins.items():
        if state := moment.tensors[f"plugin/{key}"]:
            plugin.load_state_dict(state)
    restore_clients(moment, experiment.grid.contexts())


def restore_clients(moment: Snapshot, contexts: Mapping[int, Context]) -> None:
    """Gives the clients their memory back."""
    for key, tensors in under(moment.tensors, "client").items():
        client, name = key.split("/", 1)
        contexts[int(client)].state[name] = ArrayRecord(tensors)
    for key, (kind, values) in under(moment.facts, "client").items():
        client, name = key.split("/", 1)
        plain = {field: bytes.fromhex(v["hex"]) if isinstance(v, dict) else v for field, v in values.items()}
        contexts[int(client)].state[name] = RECORDS[kind](plain)


def under(groups: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The groups of one kind by the rest of their names."""
    return {name.removeprefix(kind + "/"): group for name, group in groups.items() if name.startswith(kind + "/")}
