"""One strategy on every engine: results do not depend on where clients run."""

from __future__ import annotations

import pytest

from helpers.ray_nodes import begins_ray
from helpers.runs import DECODER, FOUR_CLIENTS, play
from helpers.states import same
from hetfl.config import resolve
from hetfl.runs import runner
from hetfl.runs.folder import RunFolder

PRUNED = {"model": "mlp", "adapter": "lora:rank=4", "extract": "loraranks", "set": {"loraranks": {"prune": 0.5}}}

TOKENS = {**DECODER, "dataset": "dialects", "limit": 80}


def ran(engine, **values):
    made = play(resolve({**FOUR_CLIENTS, **values, "engine": engine}))
    metrics = [{k: v for k, v in row.items() if "@" in k or "bytes" in k} for row in made.state.rows]
    return made.server.state, metrics, made.state.client_rows


def alike(**values):
    (state, metrics, clients), (state2, metrics2, clients2) = ran("local", **values), ran("processes", **values)
    assert all("fault" not in row for row in clients + clients2), [row.get("traceback") for row in clients2]
    assert same(state, state2)
    assert metrics == metrics2


def test_processes_give_the_bits_of_threads():
    alike(extract="fiarse", aggregate="hermes", wrap=("quantize", "topk"), set={"quantize": {"down": True}})


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"extract": "fedconv", "aggregate": "kld"},
        {"extract": "hermes"},
        {"extract": "lgfedavg"},
        {"extract": "heterofl", "norm_policy": "local", "model": "cnn", "model_args": {"widths": [8, 16]}},
        {"extract": "heterofl", "norm_policy": "static", "model": "cnn", "model_args": {"widths": [8, 16]}, "wrap": ("scaler",)},
    ],
)
def test_every_kind_of_strategy_gives_the_same_in_processes(values):
    alike(**values)


def folder_of(stops, path, engine, rounds=None, **values):
    options = resolve({**FOUR_CLIENTS, "rounds": 3, "on_client_error": "fail", **values, "engine": engine})
    runner.run(options, RunFolder(path).open(), stops.Stopping(rounds))
    return path


@pytest.mark.slow
@begins_ray
@pytest.mark.parametrize(
    ("engine", "values"),
    [
        ("ray", {"extract": "fedconv", "aggregate": "kld"}),
        ("ray", {**PRUNED, "aggregate": "flexlora", "base_dtype": "bfloat16"}),
        ("flower-sim", {"extract": "hermes"}),
        ("flower-sim", {**PRUNED, **TOKENS, "wrap": ("fedsa",)}),
    ],
    ids=lambda v: v if isinstance(v, str) else v["extract"],
)
def test_engines_on_ray_give_the_bits_of_the_local_engine(tmp_path, stops, engine, values):
    """Structured, masked and personal strategies, a language model whose base is not sent, and a run that goes on with the memory
    on the clients' disks."""
    here, there = folder_of(stops, tmp_path / "local", "local", **values), folder_of(stops, tmp_path / "there", engine, **values)
    assert stops.equal(here, there)
    if values["extract"] == "hermes":
        with pytest.raises(stops.Stopped):
            folder_of(stops, tmp_path / "part", engine, rounds=1, **values)
        stops.go_on(tmp_path / "part")
        assert stops.equal(here, tmp_path / "part")
