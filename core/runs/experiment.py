"""A whole run, put together: data, model, width groups, plugins, the server's pre-training, the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hetfl.config import RunOptions, format_run_file, refuse_for_ray
from hetfl.data.dataset import FederatedDataset
from hetfl.engines.select import EngineContext, make_engine
from hetfl.hooks.manager import PluginManager
from hetfl.hooks.server import Server
from hetfl.models.state import State, tensors
from hetfl.parallel import Pool
from hetfl.rounds.assignment import refuse_too_many
from hetfl.rounds.clock import Clock, choose_fleet
from hetfl.rounds.messages import Engine
from hetfl.rounds.reporting import Callback
from hetfl.rounds.setup import build_setup, choose_group_size, sums_on_device
from hetfl.rounds.state import RunState
from hetfl.runs.header import describe_setup, find_oddities
from hetfl.training.evaluation import Score


@dataclass(eq=False)
class Experiment:
    """Everything a run needs, ready to go.

    `given` are the options as they were asked for, `options` those with every default spelt out; `initial` are the weights before
    any training, `pretrained` those after the server's, and `score` the test accuracy of these, where the server trained;
    `group_size` is how many clients train as one; `seconds` are those of the phases before round 1.
    """

    given: RunOptions
    options: RunOptions
    federation: FederatedDataset
    plugins: PluginManager
    server: Server
    state: RunState
    initial: State
    pretrained: State
    score: Score | None
    group_size: int
    engine: Engine
    seconds: dict[str, float]

    def close(self) -> None:
        """Ends the workers."""
        self.engine.close()
        self.server.pool.close()


def prepare(
    given: RunOptions, callback: Callback, context: EngineContext | None = None, pretrained: State | None = None
) -> Experiment:
    """Loads plugins, data and model, traces the widths and pre-trains, or takes the weights `pretrained` of a run that goes on.

    `context` says where clients in other processes are. Raises UsageError for what cannot work together.
    """
    refuse_for_ray(given)
    fleet = choose_fleet(given)
    setup = build_setup(given, callback)
    federation, builder, plugins = setup.federation, setup.builder, setup.plugins
    clients = len(federation.clients)
    refuse_too_many(setup.options, clients)
    group_size, why = choose_group_size(setup)
    options = setup.options.model_copy(update={"vmap": "on" if group_size > 1 else "off"})
    pool, initial = Pool(options.workers), tensors(builder.model)
    server = Server(options, builder, initial, federation.inputs.classes, federation.public, pool, federation.kind)
    server.example = federation.inputs.batch().to(options.device)
    if why and given.vmap == "on":
        server.notes.append(f"clients train one by one, not in vmap groups: {why}")
    for line in describe_setup(setup):
        callback.fact(line)
    server.notes += find_oddities(setup)
    for text in server.notes:
        callback.note(text)
    began = time.perf_counter()
    server.state = pretrain(server, callback) if pretrained is None else pretrained
    pretrained, score = server.state, None
    if server.has_public and options.pretrain_steps:
        score = server.score(pretrained, federation.test)
        callback.fact(f"before round 1: global@test {score.accuracy:.1%}")
    said = len(server.notes)
    plugins.prepare(server)
    for text in server.notes[said:]:
        callback.note(text)
    state = RunState(
        server,
        plugins,
        callback,
        clients,
        federation.test,
        setup.meter,
        options.norm_policy,
        control=server.state,
        initial=server.state,
        device=options.device if sums_on_device(setup) else "cpu",
        clock=None if fleet is None else Clock(fleet, options, federation.train_sizes),
    )
    config = format_run_file(options, plugins.options())
    engine = make_engine(setup.runtime(stays=state.device != "cpu"), pool, group_size, config, context or EngineContext())
    seconds = {"pretrain": time.perf_counter() - began}
    return Experiment(given, options, federation, plugins, server, state, initial, pretrained, score, group_size, engine, seconds)


def pretrain(server: Server, callback: Callback) -> State:
    """The model after the server's pre-training, which every method gets alike; progress is told as the phase's name."""
    steps = server.options.pretrain_steps
    callback.phase(0, "pretrain")
    if not (server.has_public and steps):
        return server.state
    examples = len(server.public.tune)
    callback.fact(f"pre-training: {steps} steps on the server's {examples} examples (--pretrain-steps; every method alike)")

    def watch(step: int) -> None:
        callback.phase(0, f"pretrain, step {step} of {steps}")

    return server.train(server.state, steps, "pretrain", watch=watch)
