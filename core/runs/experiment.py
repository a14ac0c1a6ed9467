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
from hetfl.parallel import Pool, return_free_memory
from hetfl.rounds.assignment import refuse_too_many
from hetfl.rounds.clock import Clock, choose_fleet
from hetfl.rounds.messages import Engine
from hetfl.rounds.reporting import Callback
from hetfl.rounds.setup import Setup, build_setup, choose_group_size, sums_on_device
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
    federation, plugins = setup.federation, setup.plugins
    refuse_too_many(setup.options, len(federation.clients))
    group_size, why = choose_group_size(setup)
    server = make_server(setup, group_size)
    initial = server.state
    if why and given.vmap == "on":
        server.notes.append(f"clients train one by one, not in vmap groups: {why}")
    for line in describe_setup(setup):
        callback.fact(line)
    server.notes += find_oddities(setup)
    tell_notes(server, callback)
    began = time.perf_counter()
    server.state = pretrain(server, callback) if pretrained is None else pretrained
    pretrained, score = server.state, None
    if server.has_public and server.options.pretrain_steps:
        score = server.score(pretrained, federation.test)
        callback.fact(f"before round 1: global@test {score.accuracy:.1%}")
    told = len(server.notes)
    plugins.prepare(server)
    tell_notes(server, callback, told)
    clock = None if fleet is None else Clock(fleet, server.options, federation.train_sizes)
    state = make_state(setup, server, callback, clock)
    config = format_run_file(server.options, plugins.options())
    runtime = setup.runtime(stays=state.device != "cpu")
    engine = make_engine(runtime, server.pool, group_size, config, context or EngineContext())
    return_free_memory()  # which training took
    seconds = {"pretrain": time.perf_counter() - began}
    return Experiment(
        given, server.options, federation, plugins, server, state, initial, pretrained, score, group_size, engine, seconds
    )


def make_server(setup: Setup, group_size: int) -> Server:
    """The server before any training, with the workers of this process."""
    options, builder, federation = setup.options, setup.builder, setup.federation
    options = options.model_copy(update={"vmap": "on" if group_size > 1 else "off"})
    pool, initial = Pool(options.workers), tensors(builder.model)
    server = Server(options, builder, initial, federation.inputs.classes, federation.public, pool, federation.kind)
    server.example = federation.inputs.batch().to(options.device)
    return server


def make_state(setup: Setup, server: Server, callback: Callback, clock: Clock | None) -> RunState:
    """What lasts from round to round, before round 1; the control begins where the global model does."""
    return RunState(
        server,
        setup.plugins,
        callback,
        len(setup.federation.clients),
        setup.federation.test,
        setup.meter,
        server.options.norm_policy,
        control=server.state,
        initial=server.state,
        device=server.options.device if sums_on_device(setup) else "cpu",
        clock=clock,
    )


def tell_notes(server: Server, callback: Callback, told: int = 0) -> None:
    """Tells the server's notes but for the first, that were `told` before."""
    for text in server.notes[told:]:
        callback.note(text)


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
