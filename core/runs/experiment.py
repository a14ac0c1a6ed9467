"""A whole run, put together: data, model, width groups, plugins, rounds, engine."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from hetfl.config import RunOptions, format_run_file
from hetfl.data.dataset import FederatedDataset
from hetfl.engines import select
from hetfl.engines.local import LocalGrid
from hetfl.engines.remote import RemoteGrid
from hetfl.engines.select import EngineContext
from hetfl.hooks.manager import PluginManager
from hetfl.hooks.server import Server
from hetfl.models.state import State, tensors
from hetfl.parallel import Pool
from hetfl.profiling.meter import Meter
from hetfl.rounds import setup
from hetfl.rounds.client import ClientRuntime
from hetfl.rounds.loop import Rounds
from hetfl.rounds.reporting import Callback
from hetfl.runs import snapshot
from hetfl.runs.checkpoint import Snapshot
from hetfl.training import vectorized


@dataclass(eq=False)
class Experiment:
    """Everything a run needs, ready to go; `initial` are the weights before any training, `pretrained` those after the server's."""

    options: RunOptions
    federation: FederatedDataset
    plugins: PluginManager
    server: Server
    rounds: Rounds
    initial: State
    pretrained: State
    meter: Meter
    vmap_clients: int
    seconds: dict[str, float]
    grid: LocalGrid | RemoteGrid = field(init=False)

    def close(self) -> None:
        """Ends the workers."""
        self.grid.close()
        self.server.pool.close()


def prepare(options: RunOptions, watch: Callback, moment: Snapshot | None = None, where: EngineContext | None = None) -> Experiment:
    """Loads plugins, data and model, traces the widths and pre-trains; with `moment`, the run is what it was then.

    `where` says where clients in other processes are.


    Raises UsageError for what cannot work together.
    """
    common, pool = setup.build_setup(options, watch), Pool(options.workers)
    federation, builder, plugins = common.federation, common.builder, common.plugins
    initial = tensors(builder.model)
    server = Server(options, builder, initial, len(federation.classes), federation.public, pool)
    began = time.perf_counter()
    watch.phase(0, "pretrain")
    if moment is not None:
        server.state = moment.tensors["pretrained"]
    elif server.has_public:
        server.state = server.trained(initial, options.pretrain_steps, "pretrain")
    pretrained = server.state
    plugins.prepare(server)
    desk = select.desk(options)
    rounds = Rounds(server, plugins, desk, federation.test, len(federation.clients), watch, common.meter)
    site = common.site(desk)
    vmap_clients, why = vmap_group_size(site, builder.model)
    if why and options.vmap == "on":
        server.notes.append(f"clients train one by one, not in vmap groups: {why}")
    seconds = {"pretrain": time.perf_counter() - began}
    made = Experiment(options, federation, plugins, server, rounds, initial, pretrained, common.meter, vmap_clients, seconds)
    made.grid = select.grid(
        site, pool, vmap_clients, format_run_file(resolved(made), plugins.options()), where or EngineContext(Path("memory"))
    )
    if moment is not None:
        snapshot.restore(made, moment)
    return made


def vmap_group_size(site: ClientRuntime, model: nn.Module) -> tuple[int, str | None]:
    """How many clients train as one, and why no more than one where that is so."""
    if site.options.engine != "local":
        return 1, f"the engine '{site.options.engine}' has each client by itself"
    if not site.roles.plain_fit:
        return 1, "a plugin takes part in local training"
    size = vectorized.group_size(model, site.options, site.federation.shape, site.builder.widths.draws)
    if size < 2:
        return 1, "the model draws random numbers or is recurrent"
    test = site.federation.test
    why = vectorized.find_stacking_error(copy.deepcopy(model), test.x[test.index[:2]].cpu())
    return (1, why) if why else (size, None)


def resolved(experiment: Experiment) -> RunOptions:
    """The options with every default that depended on the data or the plugins spelt out."""
    vmap = "on" if experiment.vmap_clients > 1 else "off"
    return setup.resolve_defaults(experiment.options, experiment.federation, experiment.plugins, experiment.rounds.policy, vmap)
