"""Whole runs in a folder, and runs made ready round by round."""

from __future__ import annotations

from safetensors.torch import load

from hetfl import registry
from hetfl.config import resolve
from hetfl.rounds.loop import run_round
from hetfl.rounds.reporting import NoCallback
from hetfl.runs import runner
from hetfl.runs.experiment import prepare
from hetfl.runs.folder import RunFolder

EXTRACTIONS = [e.name for e in registry.builtins() if e.role == "extract" and e.any_model]


AGGREGATIONS = [e.name for e in registry.builtins() if e.role == "aggregate" and e.any_model]


SMALL = {"limit": 300, "clients": 4, "rounds": 2, "epochs": 1, "pretrain_steps": 5, "partition": "iid"}


def run(out, **values):
    """The final weights and the summary of a run."""
    folder = RunFolder(out).open()
    summary = runner.run(resolve({**SMALL, **values}), folder, NoCallback())
    return load((out / "weights.safetensors").read_bytes()), summary


def tuned(extract, aggregate, steps):
    """A pair with as many server steps a round, where its parts take any."""
    options = {
        ("extract", "fedconv"): {"steps": steps, "first_steps": steps},
        ("extract", "serveralone"): {"epochs": 1},
        ("extract", "dac"): {"epochs": 1, "patience": 1, "stall": 0.3, "tune": 5},
        ("extract", "lotteryfl"): {"threshold": 0.0},
        ("extract", "hermes"): {"threshold": 0.0},
        ("extract", "tailorfl"): {"steps": 2},
        ("aggregate", "kld"): {"steps": steps},
        ("aggregate", "geomedian"): {"least": 1},
        ("aggregate", "fedmd"): {"public_epochs": 1, "distill_steps": 0},
        ("aggregate", "fedtgp"): {"epochs": 2},
    }
    chosen = {
        role: {name: options[role, name]}
        for role, name in (("extract", extract), ("aggregate", aggregate))
        if (role, name) in options
    }
    return {"extract": extract, "aggregate": aggregate, "set": chosen}


TINY = {
    "limit": 120,
    "pretrain_steps": 60,
    "clients": 3,
    "batch_size": 64,
    "rounds": 3,
    "model": "mlp",
    "model_args": {"hidden": [8, 6]},
    "levels": "1,0.5,0.5",
}


NORMED = {"extract": "heterofl", "aggregate": "overlap", "model": "cnn", "model_args": {"widths": [8, 8]}, "rounds": 1}


FOUR_CLIENTS = {
    "limit": 200, "clients": 4, "rounds": 2, "epochs": 1, "pretrain_steps": 5, "levels": "1:2,0.5:2", "control": False,
    "vmap": "off", "workers": 2,
}  # fmt: skip


SIX_DEVICES = {
    "dataset": "digits", "limit": 300, "clients": 6, "epochs": 1, "batch_size": 8, "pretrain_steps": 0, "partition": "iid",
    "server_data": 0, "control": False, "model": "mlp", "model_args": {"hidden": [16, 8]}, "extract": "heterofl",
    "levels": "1:3,0.5:3", "fleet": "fedgmr",
}  # fmt: skip


DECODER = {"model": "decoder", "model_args": {"width": 16, "layers": 1, "heads": 2}, "lr": 0.3}


THREE_NODES = {"limit": 300, "rounds": 3, "epochs": 1, "pretrain_steps": 20, "levels": "1,0.5,0.25", "clients": 3, "vmap": "off"}


STOPPABLE = {
    "limit": 200, "clients": 4, "rounds": 4, "epochs": 1, "pretrain_steps": 20, "levels": "1:2,0.5:2", "fraction": 0.75,
    "workers": 2,
}  # fmt: skip


def play(options, look=lambda made: None, context=None):
    """All rounds of a run in memory: the experiment, its workers ended, with `rounds`: for each the global model before it, its
    RoundState, and what `look(experiment)` saw after it."""
    made = prepare(options, NoCallback(), context)
    made.rounds = []
    try:
        for number in range(1, made.options.rounds + 1):
            before = made.server.state
            now = run_round(made.state, number, made.engine)
            made.rounds.append((before, now, look(made)))
    finally:
        made.close()
    return made


def ready(steps=2, **values):
    base = {"limit": 200, "clients": 4, "rounds": 3, "epochs": 1, "pretrain_steps": 5, "levels": "1:2,0.5:2", "control": False}
    made = prepare(resolve({**base, **values}), NoCallback())
    for round in range(1, steps + 1):
        run_round(made.state, round, made.engine)
    return made
